"""Decode with PyAV, and read from packets which frames a file has. T frames asked for, H and W source pixels."""

import sys
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video.frames import Choose, ClipHeader, DecodeOptions, FrameEvent, reason_of

if TYPE_CHECKING:
    import av

# In DivX and Xvid files a packet of a few bytes holds no picture; in other codecs even the smallest packet does.
_NEVER_CODED = ("mpeg4", "msmpeg4", "h263", "flv")
_LEAST_PICTURE_NBYTES = 8
_LEAST_LOSS_S, _LEAST_LOSS = 0.3, 0.05  # seconds, and share of the length; less may be rounding


class NoIndex(Exception):
    """The packets of a file do not say which frame is which."""


def pyav_frames(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    """Yield what `video.decode_frames` yields, decoded by PyAV."""
    import av

    try:
        with _complaints_heard(path, options):
            try:
                yield from _seek(path, choose, options)
            except NoIndex:  # decode from the start, and count
                yield from _decode_all(path, choose, options)
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be decoded ({reason_of(error)})") from error


@dataclass(frozen=True, kw_only=True)
class CodedFrames:
    """The frames of a file, by its packets.

    Attributes:
        count: number of frames.
        frame_bytes: bytes of one as RGB.
        codec: FFmpeg's name of their codec.
    """

    count: int
    frame_bytes: int
    codec: str


def coded_frames(path: str | Path, options: DecodeOptions) -> CodedFrames:
    """Return what the packets of a file say of its frames.

    Raises: NoIndex where packets do not number frames; ClipError where packets are missing or damaged.
    """
    with _complaints_heard(path, options), _open(path) as (container, stream):
        count = len(_read_index(path, container, stream, options).times)
        coded = stream.codec_context
        return CodedFrames(
            count=count, frame_bytes=3 * coded.width * coded.height, codec=coded.codec.canonical_name
        )


@contextmanager
def _complaints_heard(path: str | Path, options: DecodeOptions) -> Iterator[None]:
    """Watch PyAV's libraries meanwhile. Raises: ClipError at the end, with the first error that they logged."""
    import av

    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # a second pass over a file logs the same message again
    with av.logging.Capture() as messages:
        yield
    complaints = [text.strip() for level, _, text in messages if level <= av.logging.ERROR]
    if complaints and not options.tolerate_bad_frames:
        raise ClipError(f"{path}: has damaged frames ({complaints[0][:160]})")


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


@dataclass(frozen=True, kw_only=True)
class _Index:
    """The times of all frames and of key frames, ascending, in the stream's units."""

    times: list[int]
    keys: list[int]

    def key_before(self, time: int) -> int:
        """Return the time of the key frame from which decoding reaches `time`."""
        return self.keys[bisect_right(self.keys, time) - 1]


def _read_index(
    path: str | Path,
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    options: DecodeOptions,
) -> _Index:
    """Return the times of frames, by the packets.

    Raises: NoIndex where packets do not number frames; ClipError where many of them are missing.
    """
    times, keys = array("q"), array("q")
    end, smallest_nbytes = 0, sys.maxsize
    for packet in container.demux(stream):  # packets are not kept: an hour of them would fill the memory
        if not packet.size:
            continue
        if packet.pts is None:
            raise NoIndex
        times.append(packet.pts)
        end = max(end, packet.pts + (packet.duration or 0))
        smallest_nbytes = min(smallest_nbytes, packet.size)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if stream.codec_context.name.startswith(_NEVER_CODED) and smallest_nbytes < _LEAST_PICTURE_NBYTES:
        raise NoIndex
    index = _Index(times=sorted(times), keys=sorted(keys))
    if not keys or index.keys[0] != index.times[0] or len(set(times)) < len(times):
        raise NoIndex
    if not options.tolerate_bad_frames:
        _check_length(path, container, stream, end - index.times[0])
    return index


def _check_length(
    path: str | Path, container: "av.container.InputContainer", stream: "av.VideoStream", ticks: int
) -> None:
    """Compare the length of a file's packets with the length that its container declares.

    A damaged container may lose most packets without an error.

    Raises: ClipError where much is missing.
    """
    assert stream.time_base is not None  # where packets have times
    length_s = float(ticks * stream.time_base)
    declared_s: float | None = None
    if stream.duration is not None:
        declared_s = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        declared_s = container.duration / 1e6
    if declared_s is not None and declared_s - length_s > _LEAST_LOSS_S + _LEAST_LOSS * declared_s:
        raise ClipError(
            f"{path}: has lost frames (it says that it lasts {declared_s:.2f} s, {length_s:.2f} s are there)"
        )


def _seek(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    """Yield the chosen frames, decoded from the key frames before them. Raises: NoIndex as `_read_index` does."""
    with _open(path) as (container, stream):
        index = _read_index(path, container, stream, options)
        indices = choose(len(index.times))
        wanted = [index.times[number] for number in np.unique(indices).tolist()]

        def chosen() -> Iterator[np.ndarray]:
            at: int | None = None  # time of the last frame decoded
            decoding: Iterator[av.VideoFrame] = iter(())
            for time in wanted:
                key = index.key_before(time)
                if at is None or key > at:
                    container.seek(key, stream=stream, backward=True)
                    decoding = _decode(container, stream, wanted=frozenset(wanted))
                for frame in decoding:
                    at = frame.pts
                    _check_whole(path, frame, options, since=key)
                    if at is None or at >= time:
                        break
                if at != time:
                    raise NoIndex
                yield _upright(frame)

        yield from _with_header(path, chosen(), indices, len(index.times))


def _decode(
    container: "av.container.InputContainer", stream: "av.VideoStream", *, wanted: frozenset[int]
) -> Iterator["av.VideoFrame"]:
    """Yield frames from here on; of H.264 without those that are neither wanted nor needed to decode others.

    Only H.264 marks pictures that no other picture refers to (nal_ref_idc 0); with B-frames every second one is such.
    """
    may_skip = stream.codec_context.name == "h264"
    for packet in container.demux(stream):
        if may_skip:
            is_wanted = not packet.size or packet.pts in wanted
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        yield from packet.decode()


def _decode_all(path: str | Path, choose: Choose, options: DecodeOptions) -> Iterator[FrameEvent]:
    """Yield what `_seek` yields, by decoding the whole file twice: once to count frames, once to take the chosen ones."""
    count = 0
    with _open(path) as (container, stream):
        for frame in container.decode(stream):
            _check_whole(path, frame, options)
            count += 1
    indices = choose(count)
    wanted = set(np.unique(indices).tolist())
    with _open(path) as (container, stream):
        found = (_upright(frame) for number, frame in enumerate(container.decode(stream)) if number in wanted)
        given = 0
        for event in _with_header(path, found, indices, count):
            yield event
            given += not isinstance(event, ClipHeader)
    if given != len(wanted):
        raise ClipError(f"{path}: cannot be decoded (it gives other frames when it is decoded again)")


def _with_header(
    path: str | Path, frames: Iterable[np.ndarray], indices: np.ndarray, count: int
) -> Iterator[FrameEvent]:
    """Yield a header, then the frames (H, W, 3) as pieces of one. Raises: ClipError where their size changes."""
    import av

    size: tuple[int, ...] | None = None
    for frame in frames:
        if size is None:
            size = frame.shape
            yield ClipHeader(
                indices=indices,
                num_frames_in_file=count,
                frame_size=(size[0], size[1]),
                decoder=f"PyAV {av.__version__}",
            )
        if frame.shape != size:
            raise ClipError(f"{path}: cannot be decoded (frames change their size within the file)")
        yield frame[None]


def _check_whole(
    path: str | Path, frame: "av.VideoFrame", options: DecodeOptions, *, since: int | None = None
) -> None:
    """Check that a frame is not partly concealed; one before the key frame `since` may be.

    Raises: ClipError where it is.
    """
    if options.tolerate_bad_frames or not frame.is_corrupt:
        return
    if since is None or frame.pts is None or frame.pts >= since:
        raise ClipError(f"{path}: has damaged frames (one is concealed in part)")


def _upright(frame: "av.VideoFrame") -> np.ndarray:
    """Return a frame as uint8 (H, W, 3), rotated as the file asks and as decord does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # swscale remarks on unusual colour ranges
        picture: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, k=frame.rotation // 90 % 4))
