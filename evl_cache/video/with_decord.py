"""Decode with decord, from whichever package. T frames asked for, H and W source pixels."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video import native_messages
from evl_cache.video.frames import Choose, DecodeOptions, FrameEvent, frames_in_pieces, reason_of
from evl_cache.video.packets import Packets
from evl_cache.video.shown import seconds_of
from evl_cache.video.which_decord import decord_and_version, load_decord

# decord counts the frames that it recovered; more than this share of all frames is an error.
_NO_FAULT = 1e-9
# Of others the FFmpeg of decord 0.6 (4.1) overlooks damage (HEVC); they may be interlaced without saying so, or are rare.
_CODECS = ("h264", "vp8", "vp9")


def is_for_decord(path: str | Path, packets: Packets) -> bool:
    """Whether it is proved that decord serves the same frames and pixels of a file as PyAV."""
    return (
        packets.unproved is None
        and not packets.has_hidden
        and packets.times[0] >= 0
        and packets.codec in _CODECS
        and packets.only_pyav is None
        and _is_utf8(path)
    )


def decord_frames(
    path: str | Path, choose: Choose, options: DecodeOptions, packets: Packets
) -> Iterator[FrameEvent]:
    """Yield what `video.decode_frames` yields, decoded by decord.

    Raises: ClipError where it complains, or counts other frames than there are packets.
    """
    decord = load_decord()

    try:
        with native_messages.heard() as complaints:
            yield from _read(path, choose, options, packets)
    except decord.DECORDLimitReachedError as error:
        raise ClipError(f"{path}: has frames that were never coded or are lost") from error
    except (decord.DECORDError, OSError, RuntimeError) as error:
        raise ClipError(
            f"{path}: cannot be decoded ({reason_of(error).replace(f'[{os.path.abspath(path)}] ', '')})"
        ) from error
    if complaints and not options.tolerate_bad_frames:
        raise ClipError(f"{path}: has damaged frames ({complaints[0]})")


def _read(path: str | Path, choose: Choose, options: DecodeOptions, packets: Packets) -> Iterator[FrameEvent]:
    decord = load_decord()

    # A new reader for each clip, as a reused one leaks memory, and one thread, as more would compete with the other workers'.
    reader = decord.VideoReader(
        os.path.abspath(path),
        ctx=decord.cpu(0),
        num_threads=1,
        fault_tol=-1 if options.tolerate_bad_frames else _NO_FAULT,
    )
    count = len(reader)
    if count != len(packets.times):
        raise ClipError(f"{path}: decord counts {count} frames, {len(packets.times)} are coded")

    def read(numbers: np.ndarray) -> np.ndarray:
        frames: np.ndarray = reader.get_batch(numbers).asnumpy()
        return frames

    yield from frames_in_pieces(
        count,
        choose,
        read,
        seconds=lambda: seconds_of(packets),
        frame_bytes=packets.frame_bytes,
        decoder=decord_and_version(),
    )


def _is_utf8(path: str | Path) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
