"""Frames out of video files. The only package that knows decord and torchcodec, and PyAV as a decoder.

decord first: it is fast and exact on healthy files. PyAV for what decord cannot open, such as AV1, for large files, and as
a second opinion where decord complains of a file or, as of HEVC, may overlook damage. A process that uses torch must
import it before this decodes: their bundled libraries clash otherwise.
T frames asked for, H and W source pixels.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import Choose, ClipHeader, DecodedClip, DecodeOptions, FrameEvent, has_decord
from evl_cache.video.native_messages import own_stderr
from evl_cache.video.with_decord import decord_frames
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
    "own_stderr",
]


def decode_frames(
    path: str | Path, choose: Choose, *, options: DecodeOptions | None = None
) -> Iterator[FrameEvent]:
    """Only the frames that `choose(num_frames_in_file) -> (views, T)` asks for, each once, as `FrameEvent`s.

    `choose` may be called again, where another decoder counts other frames.

    Raises: ClipError with the reason where the file cannot be read, or frames of it are damaged; then also the frames
        that were given do not count.
    """
    options = options or DecodeOptions()
    if options.decoder == "torchcodec":
        yield from torchcodec_frames(path, choose, options)
        return
    if options.decoder == "pyav" or not has_decord():
        yield from pyav_frames(path, choose, options)
        return
    try:
        yield from decord_frames(path, choose, options)
        return
    except ClipError as error:
        if options.decoder == "decord":
            raise
        refused = error
    try:
        yield from pyav_frames(path, choose, options)
    except ClipError as error:
        told = str(error).removeprefix(f"{path}: ")
        raise ClipError(f"{refused}; PyAV: {told}") from error


def decode_clip(path: str | Path, choose: Choose, *, options: DecodeOptions | None = None) -> DecodedClip:
    """As `decode_frames`, all at once."""
    return collect(decode_frames(path, choose, options=options))


def collect(events: Iterable[FrameEvent]) -> DecodedClip:
    """What events come to."""
    header: ClipHeader | None = None
    frames: list[np.ndarray] = []
    for event in events:
        if isinstance(event, ClipHeader):
            header, frames = event, []
        else:
            frames.append(event)
    assert header is not None  # else ClipError was raised
    return DecodedClip(header=header, frames=frames[0] if len(frames) == 1 else np.concatenate(frames))
