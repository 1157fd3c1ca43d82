"""Compare every frame that is served with a decode from the start: for tests, and for who doubts a corpus of videos."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import ClipHeader, DecodeOptions, FrameEvent
from evl_cache.video.orientation import display_matrix
from evl_cache.video.packets import open_video
from evl_cache.video.pictures import picture_of

VARIABLE = "EVL_CACHE_PROVE_FRAMES"


def proves_frames() -> bool:
    """Whether the environment asks for proofs."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def frames_proved(
    path: str | Path, frames: Iterator[FrameEvent], options: DecodeOptions
) -> Iterator[FrameEvent]:
    """Yield frames, and compare them with the plainest decode there is.

    Raises: ClipError where they are others, or another number of frames was counted.
    """
    header: ClipHeader | None = None
    served: list[np.ndarray] = []
    for event in frames:
        if isinstance(event, ClipHeader):
            header, served = event, []
        else:
            served.extend(event)
        yield event
    if header is None or options.decoder == "torchcodec":  # whose pixels are its own
        return
    expected = dict(zip(header.distinct.tolist(), served, strict=True))
    count = 0
    with open_video(path) as (container, stream):
        matrix = None
        for frame in container.decode(stream):
            matrix = display_matrix(frame) or matrix
            if count in expected and not np.array_equal(picture_of(path, frame, matrix), expected.pop(count)):
                raise ClipError(f"{path}: proof failed: frame {count} by {header.decoder} is another picture")
            count += 1
    if expected or count != header.num_frames_in_file:
        raise ClipError(
            f"{path}: proof failed: {header.decoder} counts {header.num_frames_in_file} frames, {count} are shown"
        )
