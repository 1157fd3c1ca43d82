"""Decode with decord. T frames asked for, H and W source pixels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video import native_messages, with_pyav
from evl_cache.video.frames import Choose, DecodeOptions, FrameEvent, frames_in_pieces, reason_of

# decord counts the frames that it recovered; more than this share of all frames is an error.
_NO_FAULT = 1e-9
# For these codecs decord's FFmpeg (4.1) decodes some damaged files without any message; PyAV's reports them.
_OVERLOOKS_DAMAGE = ("hevc",)
# Until the first wanted frame is decoded, decord reads ahead, and may hold the whole file in memory.
MOST_FILE_BYTES = 256 << 20
# Where frames are taken slowly, decord decodes ahead, and may hold all remaining frames in memory.
MOST_DECODED_BYTES = 1 << 30


class NotForDecord(ClipError):
    """The file is of a kind that decord is not given: that is no complaint of its bytes."""


def decord_frames(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    """Yield what `video.decode_frames` yields, decoded by decord."""
    import av
    import decord

    try:
        if options.decoder == "auto" and Path(path).stat().st_size > MOST_FILE_BYTES:
            raise NotForDecord(f"{path}: is large, and decord would keep it in memory")
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

    # A new reader for each clip, as a reused one leaks memory, and one thread, as more would compete with the other workers'.
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
    """Return the bytes of a frame; None where bad frames are tolerated and packets do not tell.

    If packets number other frames than decord counts, some frames were never coded, as in AVI files. decord then
    returns other pictures each time, and does not always report it.

    Raises: ClipError where decord should not decode the file.
    """
    try:
        coded = with_pyav.coded_frames(path, options)
    except (with_pyav.NoIndex, ClipError) as error:
        if options.tolerate_bad_frames:
            return None
        if isinstance(error, ClipError):
            raise
        raise NotForDecord(
            f"{path}: its packets do not tell which frame is which, on which decord relies"
        ) from error
    if options.decoder == "auto" and count * coded.frame_bytes > MOST_DECODED_BYTES:
        raise NotForDecord(f"{path}: is large, and decord would keep it in memory")
    if options.tolerate_bad_frames:
        return coded.frame_bytes
    if options.decoder == "auto" and coded.codec in _OVERLOOKS_DAMAGE:
        raise NotForDecord(f"{path}: decord may overlook damage of {coded.codec}")
    if coded.count != count:
        raise ClipError(f"{path}: decord counts {count} frames, {coded.count} are coded")
    return coded.frame_bytes
