"""Frames out of video files. The only module that knows decord, and PyAV as a decoder.

decord first: it is fast and exact on healthy files. PyAV for what decord cannot open, such as AV1, and as a second
opinion where decord complains of a file. A process that uses torch must import it before this decodes: their bundled
libraries clash otherwise.
T frames asked for, H and W source pixels.
"""

import ctypes
import os
import re
import sys
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evl_cache.errors import ClipError, UsageError

if TYPE_CHECKING:
    import av

# What decord recovers it counts, and this share of the frames is too much.
_NO_FAULT = 1e-9
_AV_LOG_PRINT_LEVEL = 2
DECODERS = ("auto", "decord", "pyav")

Choose = Callable[[int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class DecodedClip:
    """Frames of one clip and where they came from.

    Attributes:
        frames: uint8 (distinct frames, H, W, 3), RGB, at source resolution, in the order of the file.
        positions: int64 (views, T): row of `frames` for each frame of each view.
        indices: int64 (views, T): frame numbers in the file.
        num_frames_in_file: as the decoder counts them.
        decoder: which library served, with its version.
    """

    frames: np.ndarray
    positions: np.ndarray
    indices: np.ndarray
    num_frames_in_file: int
    decoder: str

    def view(self, number: int) -> np.ndarray:
        """Frames of one temporal view, uint8 (T, H, W, 3)."""
        frames: np.ndarray = self.frames[self.positions[number]]
        return frames


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How clips are decoded.

    Attributes:
        decoder: `decord`, `pyav`, or `auto`: decord, and PyAV where decord cannot read the file or complains of it.
        tolerate_bad_frames: take what a decoder puts in the place of damaged frames, instead of failing the clip.
    """

    decoder: str = "auto"
    tolerate_bad_frames: bool = False

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise UsageError(f"decoder {self.decoder!r}; expected one of {', '.join(DECODERS)}")


def decode_clip(path: str | Path, choose: Choose, *, options: DecodeOptions | None = None) -> DecodedClip:
    """Decode only the frames that `choose(num_frames_in_file) -> (views, T)` asks for, each once.

    `choose` may be called again, where another decoder counts other frames.

    Raises: ClipError with the reason where the file cannot be read, or frames of it are damaged.
    """
    options = options or DecodeOptions()
    if options.decoder == "pyav":
        return _with_pyav(path, choose, options)
    try:
        return _with_decord(path, choose, options)
    except ClipError as refused:
        if options.decoder == "decord":
            raise
        try:
            return _with_pyav(path, choose, options)
        except ClipError as error:
            told = str(error).removeprefix(f"{path}: ")
            raise ClipError(f"{refused}; PyAV: {told}") from error


def _with_decord(path: str | Path, choose: Choose, options: DecodeOptions) -> DecodedClip:
    import av
    import decord

    _hear_errors()
    try:
        with _native_messages() as messages:
            # A new, single-threaded reader a clip: a reused one leaks, and threads inside a worker fight.
            reader = decord.VideoReader(
                str(path),
                ctx=decord.cpu(0),
                num_threads=1,
                fault_tol=-1 if options.tolerate_bad_frames else _NO_FAULT,
            )
            count = len(reader)
            _check_count(path, count, options)
            indices = choose(count)
            distinct, positions = np.unique(indices, return_inverse=True)
            frames = reader.get_batch(distinct).asnumpy()
            del reader
    except av.FFmpegError as error:
        raise ClipError(f"{path}: cannot be opened ({_reason(error)})") from error
    except decord.DECORDLimitReachedError as error:
        raise ClipError(f"{path}: has frames that were never coded or are lost") from error
    except (decord.DECORDError, OSError, RuntimeError) as error:
        raise ClipError(f"{path}: cannot be decoded ({_reason(error)})") from error
    complaint = next(filter(None, map(_complaint, messages)), None)
    if complaint and not options.tolerate_bad_frames:
        raise ClipError(f"{path}: has damaged frames ({complaint})")
    return DecodedClip(
        frames=frames,
        positions=positions.reshape(indices.shape),
        indices=indices,
        num_frames_in_file=count,
        decoder=f"decord {decord.__version__}",
    )


def _hear_errors() -> None:
    import av

    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # a second look at a file complains of the same


def _check_messages(path: str | Path, messages: list[tuple[int, str, str]]) -> None:
    """Raises: ClipError with the first error that PyAV's libraries told of."""
    import av

    complaints = [text.strip() for level, _, text in messages if level <= av.logging.ERROR]
    if complaints:
        raise ClipError(f"{path}: has damaged frames ({complaints[0][:160]})")


def _check_count(path: str | Path, count: int, options: DecodeOptions) -> None:
    """Where the packets number other frames than decord counts, some were never coded, as AVI files may have it.

    What decord gives in their place differs from one time to the next, and it does not always say so.
    """
    if options.tolerate_bad_frames:
        return
    import av

    with av.logging.Capture() as messages, _open(path) as (container, stream):
        try:
            coded = len(_index(container, stream, options)[0])
        except _NoIndex as error:
            raise ClipError(
                f"{path}: its packets do not tell which frame is which, on which decord relies"
            ) from error
    _check_messages(path, messages)
    if coded != count:
        raise ClipError(f"{path}: decord counts {count} frames, {coded} are coded")


_owns_stderr = False


def own_stderr() -> None:
    """Say that this process exists to decode, one clip at a time, and that its stderr is nobody else's.

    decord conceals damaged frames without an error; only the messages that its FFmpeg writes to stderr tell of them.
    """
    import decord

    global _owns_stderr
    _owns_stderr = True
    decord.logging.set_level(decord.logging.INFO if _say_levels() else decord.logging.ERROR)


def _say_levels() -> bool:
    """Have decord's FFmpeg write the level of each message before it. Returns: whether it does."""
    import decord

    libraries = sorted((Path(decord.__file__).parent.parent / "decord.libs").glob("libavutil*"))
    if not libraries:  # as on Windows: errors alone are heard
        return False
    ctypes.CDLL(str(libraries[0])).av_log_set_flags(_AV_LOG_PRINT_LEVEL)
    return True


def _complaint(message: str) -> str | None:
    """What a message of decord's FFmpeg says against a file; None for remarks.

    That it made up part of a picture is said as a remark, sometimes with no error before it.
    """
    found = re.match(r"(?:\[[^]]* @ [^]]*\] )?(?:\[(\w+)\] )?(.*)", message)
    assert found is not None  # it matches everything
    level, text = found.groups()
    is_remark = level in ("warning", "info", "verbose", "debug") and not text.startswith("concealing")
    return None if is_remark else text.strip()[:160]


@contextmanager
def _native_messages() -> Iterator[list[str]]:
    """What C libraries write to stderr meanwhile, line by line; nothing where stderr is not ours to take."""
    lines: list[str] = []
    if not _owns_stderr:
        yield lines
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(kept, 2)
            file.seek(0)
            text = file.read(1 << 16).decode(errors="replace")
            lines += [line.strip() for line in text.splitlines() if line.strip()]
    finally:
        os.close(kept)


def _with_pyav(path: str | Path, choose: Choose, options: DecodeOptions) -> DecodedClip:
    import av

    _hear_errors()
    try:
        with av.logging.Capture() as messages:
            try:
                count, indices, frames = _seek_frames(path, choose, options)
            except _NoIndex:  # the packets do not tell which frame is which: decode from the start and count
                count, indices, frames = _all_frames(path, choose, options)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be decoded ({_reason(error)})") from error
    positions = np.unique(indices, return_inverse=True)[1]
    if len({frame.shape for frame in frames}) > 1:
        raise ClipError(f"{path}: cannot be decoded (frames change their size within the file)")
    if not options.tolerate_bad_frames:
        _check_messages(path, messages)
    return DecodedClip(
        frames=np.stack(frames),
        positions=positions.reshape(indices.shape),
        indices=indices,
        num_frames_in_file=count,
        decoder=f"PyAV {av.__version__}",
    )


class _NoIndex(Exception):
    """The packets of a file do not say which frame is which."""


def _seek_frames(
    path: str | Path, choose: Choose, options: DecodeOptions
) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """Frames in the file, indices chosen, and the distinct frames, decoded from the key frames before them.

    Raises: _NoIndex where the packets' times do not number the frames.
    """
    with _open(path) as (container, stream):
        times, keys = _index(container, stream, options)
        indices = choose(len(times))
        frames: list[np.ndarray] = []
        at: int | None = None  # time of the last frame decoded
        decoding: Iterator[av.VideoFrame] = iter(())
        for number in np.unique(indices).tolist():
            wanted = times[number]
            key = keys[bisect_right(keys, wanted) - 1]
            if at is None or key > at:
                container.seek(key, stream=stream, backward=True)
                decoding = container.decode(stream)
            for frame in decoding:
                at = frame.pts
                _check_whole(path, frame, options, since=key)
                if at is None or at >= wanted:
                    break
            if at != wanted:
                raise _NoIndex
            frames.append(_upright(frame))
        return len(times), indices, frames


# Files of DivX and Xvid hold packets of some bytes that stand for no picture; other codecs' smallest do.
_NEVER_CODED = ("mpeg4", "msmpeg4", "h263", "flv")
_LEAST_PICTURE = 8
_LEAST_LOSS_S, _LEAST_LOSS = 0.3, 0.05  # seconds, and of the whole: less may be a matter of rounding


def _index(
    container: "av.container.InputContainer", stream: "av.VideoStream", options: DecodeOptions
) -> tuple[list[int], list[int]]:
    """Times of all frames and of the key frames, in order.

    Raises: _NoIndex where packets do not number frames; ClipError where many of them are missing.
    """
    # Not the packets themselves: an hour of them would fill the memory.
    packets = [(p.pts, p.duration or 0, p.size, p.is_keyframe) for p in container.demux(stream) if p.size]
    if not packets:
        raise _NoIndex
    smallest = min(size for _, _, size, _ in packets)
    if stream.codec_context.name.startswith(_NEVER_CODED) and smallest < _LEAST_PICTURE:
        raise _NoIndex
    ends = [pts + duration for pts, duration, _, _ in packets if pts is not None]
    times = sorted(pts for pts, *_ in packets if pts is not None)
    keys = sorted(pts for pts, _, _, is_key in packets if is_key and pts is not None)
    if len(times) < len(packets) or len(set(times)) < len(times) or not keys or keys[0] != times[0]:
        raise _NoIndex
    if not options.tolerate_bad_frames:
        _check_length(container, stream, max(ends) - times[0])
    return times, keys


def _check_length(container: "av.container.InputContainer", stream: "av.VideoStream", ticks: int) -> None:
    """A damaged container may lose most packets without a word: hold what is there against what it says.

    Raises: ClipError where much is missing.
    """
    assert stream.time_base is not None  # where packets have times
    declared_s, length_s = None, float(ticks * stream.time_base)
    if stream.duration is not None:
        declared_s = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        declared_s = container.duration / 1e6
    if declared_s is not None and declared_s - length_s > _LEAST_LOSS_S + _LEAST_LOSS * declared_s:
        raise ClipError(
            f"{container.name}: has lost frames (it says that it lasts {declared_s:.2f} s, {length_s:.2f} s are there)"
        )


def _check_whole(
    path: str | Path, frame: "av.VideoFrame", options: DecodeOptions, *, since: int | None = None
) -> None:
    """Raises: ClipError for a frame that is made up in part. Those before a key frame where one begins may be."""
    if options.tolerate_bad_frames or not frame.is_corrupt:
        return
    if since is None or frame.pts is None or frame.pts >= since:
        raise ClipError(f"{path}: has damaged frames (one is concealed in part)")


def _all_frames(
    path: str | Path, choose: Choose, options: DecodeOptions
) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """The slow twin of `_seek_frames`: the whole file is decoded twice, to count its frames and to take some."""
    with _open(path) as (container, stream):
        count = 0
        for frame in container.decode(stream):
            _check_whole(path, frame, options)
            count += 1
    indices = choose(count)
    wanted = set(np.unique(indices).tolist())
    with _open(path) as (container, stream):
        found = enumerate(container.decode(stream))
        frames = [_upright(frame) for number, frame in found if number in wanted]
    if len(frames) != len(wanted):
        raise ClipError(f"{path}: cannot be decoded (it gives other frames when it is decoded again)")
    return count, indices, frames


@contextmanager
def _open(path: str | Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ClipError(f"{path}: cannot be decoded (it has no video stream)")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ClipError(f"{path}: cannot be decoded (no decoder for its video stream)")
        stream.codec_context.thread_count = 1
        yield container, stream


def _upright(frame: "av.VideoFrame") -> np.ndarray:
    """uint8 (H, W, 3), turned as the file says it is to be shown, as decord does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # swscale's remarks on unusual colour ranges
        picture: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, k=frame.rotation // 90 % 4))


def _reason(error: BaseException) -> str:
    """The first telling line of a decoder's message; decord's carries a C++ stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.split("] ", 1)[-1][:200]
