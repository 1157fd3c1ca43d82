"""When the frames of a file are shown: what a choice by time is told. F frames."""

from collections.abc import Sequence

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.packets import Packets


def seconds_of(packets: Packets) -> np.ndarray:
    """Return when each frame is shown by the packets alone, float64 (F,), since the first one.

    Where they do not prove it, it is a guess for a file that was not decoded yet: each packet is one picture.

    Raises: ClipError where nothing tells.
    """
    return seconds_since_first(
        packets, packets.times or sorted(packets.stamps), len(packets.times) or packets.count
    )


def seconds_since_first(packets: Packets, stamps: Sequence[int], count: int) -> np.ndarray:
    """Return when each of `count` frames is shown, float64 (F,), since the first one.

    Args:
        packets: tell the unit of time, and the rate.
        stamps: of the frames as they are shown, in the stream's units. Where they are not all there, or do not ascend
            (files that were joined), frames follow each other at the container's rate.

    Raises: ClipError where there is no rate either.
    """
    ticks = np.asarray(stamps, np.int64)
    if len(ticks) == count and not (np.diff(ticks) < 0).any():
        # One product and one quotient of whole numbers: the double next to the exact time, as that of a decimal in a list.
        return (ticks - ticks[:1]) * packets.tick_s.numerator / packets.tick_s.denominator
    if not packets.rate:
        raise ClipError("nothing in the file says when its frames are shown; give its segments in frames")
    return np.arange(count) * packets.rate.denominator / packets.rate.numerator
