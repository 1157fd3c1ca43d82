"""Read frames from video files. No other room imports decord or torchcodec, or decodes with PyAV.

decord is tried first: it is fast, and exact on intact files. PyAV decodes what decord cannot open, such as AV1, large
files, and files that decord reports as damaged or, like HEVC, may wrongly take for intact. A process that uses torch must
import it before this room decodes, as their bundled libraries clash otherwise.
T frames asked for, H and W source pixels.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import (
    Choose,
    ClipHeader,
    DecodedClip,
    DecodeOptions,
    FrameEvent,
    has_decord,
    read_through,
)
from evl_cache.video.with_decord import NotForDecord, decord_frames
from evl_cache.video.with_pyav import pyav_frames
from evl_cache.video.with_torchcodec import torchcodec_frames

__all__ = [
    "Choose",
    "ClipHeader",
    "DecodeOptions",
    "DecodedClip",
    "FrameEvent",
    "collect",
    "decode_clip",
    "decode_frames",
]


def decode_frames(
    path: str | Path, choose: Choose, *, options: DecodeOptions | None = None
) -> Iterator[FrameEvent]:
    """Yield the chosen frames of a file, each once, as `FrameEvent`s.

    Args:
        path: of the video.
        choose: returns int64 frame numbers (views, T) for the number of frames in the file. It is called again where
            a second decoder counts differently.
        options: how to decode.

    Raises: ClipError with the reason where the file cannot be decoded or frames are damaged, Outage where something else
        than the file is at fault; frames that were yielded before must not be used then.
    """
    options = options or DecodeOptions()
    if options.decoder == "torchcodec":
        yield from torchcodec_frames(path, choose, options)
        return
    if options.decoder == "pyav" or not has_decord():
        yield from pyav_frames(path, choose, options)
        return
    if options.decoder == "decord":
        yield from decord_frames(path, choose, options)
        return
    # A disk that fails for a moment looks like damage, and of real damage decord does not always tell. Which decoder read
    # a clip is recorded, so a complaint decides only when it is made twice of three times.
    complaints = successes = 0
    while complaints < 2:
        try:
            yield from decord_frames(path, choose, options)
            successes += 1
            if complaints == 0 or successes == 2:
                return
        except NotForDecord as error:
            refused: ClipError = error
            break
        except ClipError as error:
            refused = error
            complaints += 1
            read_through(path)
    try:
        yield from pyav_frames(path, choose, options)
    except ClipError as error:
        told = str(error).removeprefix(f"{path}: ")
        raise ClipError(f"{refused}; PyAV: {told}") from error


def decode_clip(path: str | Path, choose: Choose, *, options: DecodeOptions | None = None) -> DecodedClip:
    """Return all frames of `decode_frames` at once."""
    return collect(decode_frames(path, choose, options=options))


def collect(events: Iterable[FrameEvent]) -> DecodedClip:
    """Return the clip that events make up."""
    header: ClipHeader | None = None
    frames: list[np.ndarray] = []
    for event in events:
        if isinstance(event, ClipHeader):
            header, frames = event, []
        else:
            frames.append(event)
    assert header is not None  # else ClipError was raised
    return DecodedClip(header=header, frames=frames[0] if len(frames) == 1 else np.concatenate(frames))
