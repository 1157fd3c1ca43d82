"""Frames by decord. T frames asked for, H and W source pixels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video import native_messages, with_pyav
from evl_cache.video.frames import Choose, DecodeOptions, FrameEvent, frames_in_pieces, reason_of

# What decord recovers it counts, and this share of the frames is too much.
_NO_FAULT = 1e-9
# Codecs of which decord's FFmpeg (4.1) takes some damaged files for whole without a word, where PyAV's complains.
_OVERLOOKS_DAMAGE = ("hevc",)
# While it decodes up to the first frame wanted, decord reads on, and keeps what it reads: the rest of the file.
MOST_FILE_BYTES = 256 << 20
# And where whoever takes its frames is slow, it decodes on: up to all frames that are left.
MOST_DECODED_BYTES = 1 << 30


def decord_frames(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    """As `video.decode_frames`, by decord."""
    import av
    import decord

    try:
        if options.decoder == "auto" and Path(path).stat().st_size > MOST_FILE_BYTES:
            raise ClipError(f"{path}: is large, and decord would keep it in memory")
        with native_messages.heard() as complaints:
            yield from _read(path, choose, options)
    except av.FFmpegError as error:
        raise ClipError(f"{path}: cannot be opened ({reason_of(error)})") from error
    except decord.DECORDLimitReachedError as error:
        raise ClipError(f"{path}: has frames that were never coded or are lost") from error
    except (decord.DECORDError, OSError, RuntimeError) as error:
        raise ClipError(f"{path}: cannot be decoded ({reason_of(error)})") from error
    if complaints and not options.tolerate_bad_frames:
        raise ClipError(f"{path}: has damaged frames ({complaints[0]})")


def _read(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    import decord

    # A new, single-threaded reader a clip: a reused one leaks, and threads inside a worker fight.
    reader = decord.VideoReader(
        str(path),
        ctx=decord.cpu(0),
        num_threads=1,
        fault_tol=-1 if options.tolerate_bad_frames else _NO_FAULT,
    )
    count = len(reader)
    frame_bytes = _check(path, count, options)

    def read(numbers: np.ndarray) -> np.ndarray:
        frames: np.ndarray = reader.get_batch(numbers).asnumpy()
        return frames

    yield from frames_in_pieces(
        count, choose, read, frame_bytes=frame_bytes, decoder=f"decord {decord.__version__}"
    )


def _check(path: str | Path, count: int, options: DecodeOptions) -> int | None:
    """Whether decord is the one to decode a file, by what its packets say.

    Where they number other frames than decord counts, some were never coded, as AVI files may have it. What decord gives
    in their place differs from one time to the next, and it does not always say so.

    Returns: bytes of a frame; None where bad frames are tolerated and the packets do not tell.
    """
    try:
        coded = with_pyav.coded_frames(path, options)
    except (with_pyav.NoIndex, ClipError) as error:
        if options.tolerate_bad_frames:
            return None
        if isinstance(error, ClipError):
            raise
        raise ClipError(
            f"{path}: its packets do not tell which frame is which, on which decord relies"
        ) from error
    if options.decoder == "auto" and count * coded.frame_bytes > MOST_DECODED_BYTES:
        raise ClipError(f"{path}: is large, and decord would keep it in memory")
    if options.tolerate_bad_frames:
        return coded.frame_bytes
    if options.decoder == "auto" and coded.codec in _OVERLOOKS_DAMAGE:
        raise ClipError(f"{path}: decord may overlook damage of {coded.codec}")
    if coded.count != count:
        raise ClipError(f"{path}: decord counts {count} frames, {coded.count} are coded")
    return coded.frame_bytes
