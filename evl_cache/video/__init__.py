"""Read frames from video files. No other room imports decord or torchcodec, or decodes with PyAV.

Frame n of a file is the n-th picture that a decode of its best video stream from the start shows. PyAV seeks where the
packets of a file prove that this gives the same; all other files, and all of which it complains, are decoded from their
start. decord and torchcodec serve who asks for them, likewise only where that is proved: what decord may not serve PyAV
decodes, whose pixels are the same, and torchcodec refuses it. A process that uses torch must import it before this room
decodes, as their bundled libraries clash otherwise.
T frames asked for, H and W source pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import (
    ByTime,
    Choose,
    ClipHeader,
    DecodedClip,
    DecodeOptions,
    FrameEvent,
    Shown,
    chosen,
    reason_of,
)
from evl_cache.video.lengths import Length, told_length
from evl_cache.video.linear import linear_frames
from evl_cache.video.native_messages import hears
from evl_cache.video.packets import Packets, is_first_stream, read_packets
from evl_cache.video.proof import frames_proved, proves_frames
from evl_cache.video.with_decord import decord_frames, is_for_decord
from evl_cache.video.with_pyav import Unsure, seek_frames
from evl_cache.video.with_torchcodec import torchcodec_frames

__all__ = [
    "ByTime",
    "Choose",
    "ClipHeader",
    "DecodeOptions",
    "DecodedClip",
    "FrameEvent",
    "Length",
    "Shown",
    "chosen",
    "collect",
    "decode_clip",
    "decode_frames",
    "doubt",
    "told_length",
]


def decode_frames(
    path: str | Path, choose: Choose, *, options: DecodeOptions | None = None
) -> Iterator[FrameEvent]:
    """Yield the chosen frames of a file, each once, as `FrameEvent`s.

    Args:
        path: of the video.
        choose: returns int64 frame numbers (views, T) for the number of frames in the file, or `ByTime` for when they are
            shown. It is called again where the file is decoded again, from its start, and then shows other frames; what
            it returned last before a header is what the header tells.
        options: how to decode.

    Raises: ClipError with the reason where the file cannot be decoded or frames are damaged, Outage where something else
        than the file is at fault; frames that were yielded before must not be used then.
    """
    import av

    options = options or DecodeOptions()
    frames = _decoded(path, choose, options)
    try:
        yield from frames_proved(path, frames, options) if proves_frames() else frames
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be decoded ({reason_of(error)})") from error


def doubt(path: str | Path, decoder: str) -> str | None:
    """Return why frames of a file may be others than a cache of frame rule 1 claims; None where they are the same.

    Args:
        decoder: that served them, as the cache's mark names it.

    Raises: ClipError where the file cannot be read.
    """
    import av

    try:
        packets = read_packets(path)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be read ({reason_of(error)})") from error
    if packets.has_hidden:
        return "its edit list hides frames"
    if packets.unproved is None and decoder.startswith("PyAV"):
        if packets.is_mirrored:
            return packets.only_pyav
        return None if is_first_stream(path) else "another of its video streams was taken"
    is_old = decoder.startswith("decord 0.")  # decord2 was recorded as decord too, by its own version
    return packets.unproved or (packets.only_pyav_or_decord2 if is_old else packets.only_pyav)


def _decoded(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    packets = read_packets(path)
    if packets.lost is not None and not options.tolerate_bad_frames:
        raise ClipError(f"{path}: has lost data ({packets.lost})")
    if options.decoder == "torchcodec":
        reason = packets.unproved or ("its edit list hides frames" if packets.has_hidden else None)
        reason = reason or (packets.only_pyav if packets.is_mirrored else None)
        if reason is not None:
            raise ClipError(f"{path}: torchcodec may serve other frames of it ({reason}); use --decoder auto")
        yield from torchcodec_frames(path, choose, options, packets)
        return
    if options.decoder == "decord" and is_for_decord(path, packets):
        if not options.tolerate_bad_frames and not hears():
            # decord conceals damage: PyAV must say that there is none.
            deque(linear_frames(path, choose, options, packets), maxlen=0)
        yield from decord_frames(path, choose, options, packets)
        return
    if packets.unproved is None:
        try:
            yield from seek_frames(path, choose, packets)
        except Unsure:
            pass
        else:
            return
    yield from linear_frames(path, choose, options, packets)


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
