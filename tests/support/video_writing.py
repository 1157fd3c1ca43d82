"""Write films of numbered frames with PyAV: any encoder, container, times and other streams."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition

from tests.support.numbered_films import HEIGHT, WIDTH, cached_picture

os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 tells its settings otherwise

_X264 = {"preset": "ultrafast", "crf": "18"}
# What makes each encoder fast and good enough for the numbers to be read.
_QUALITY: dict[str, dict[str, str]] = {
    "libx264": _X264,
    "libx265": {"preset": "ultrafast", "crf": "18"},
    "libvpx": {"crf": "8", "b": "2M", "deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"crf": "16", "b": "0", "deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"crf": "20", "preset": "12"},
}
_OLDER = {"qmin": "2", "qmax": "3", "b": "4M"}
# Their coefficients end at 127 or 255: with finer steps a block that turns from black to white becomes grey.
_COARSE = {"qmin": "9", "qmax": "10", "b": "4M"}
_COARSE_ENCODERS = (
    "mpeg1video",
    "wmv1",
    "wmv2",
    "msmpeg4",
    "msmpeg4v2",
    "rv20",
    "flv",
    "h263",
    "h263p",
    "mpeg4",
)
_LOSSLESS = (
    "ffv1",
    "huffyuv",
    "rawvideo",
    "png",
    "gif",
    "qtrle",
    "utvideo",
    "prores",
    "dnxhd",
    "libwebp_anim",
)


@dataclass(frozen=True, kw_only=True)
class Film:
    """One video stream to be encoded.

    Attributes:
        encoder: FFmpeg's name.
        frames: how many.
        first: number that the first one shows.
        gop: frames from one key frame to the next, at most.
        options: of the encoder, beside its usual ones.
        x264: more of libx264's or libx265's own options.
        rate: frames a second.
        times: of the frames, in units of 1/rate; None: one after the other.
        interlaced: whether frames are marked so, the upper field first.
    """

    encoder: str = "libx264"
    frames: int = 60
    first: int = 0
    gop: int = 12
    options: tuple[tuple[str, str], ...] = ()
    x264: tuple[tuple[str, str | int], ...] = ()
    pix_fmt: str = "yuv420p"
    height: int = HEIGHT
    width: int = WIDTH
    rate: Fraction = Fraction(25)
    times: tuple[int, ...] | None = None
    interlaced: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the frames show, in order."""
        return tuple(range(self.first, self.first + self.frames))

    def encoder_options(self) -> dict[str, str]:
        """Return all options of the encoder."""
        usual = _COARSE if self.encoder in _COARSE_ENCODERS else {} if self.encoder in _LOSSLESS else _OLDER
        options = dict(_QUALITY.get(self.encoder, usual))
        options["g"] = str(self.gop)
        own = {"keyint": self.gop, "min-keyint": 1, "scenecut": 0, **dict(self.x264)}
        if self.encoder == "libx264":
            own |= {"threads": 1, "mbtree": 0, "rc-lookahead": 5}
            options["x264-params"] = ":".join(f"{name}={value}" for name, value in own.items())
        if self.encoder == "libx265":
            own |= {"pools": "none", "frame-threads": 1, "log-level": "none", "rc-lookahead": 5}
            options["x265-params"] = ":".join(f"{name}={value}" for name, value in own.items())
        if self.encoder == "libsvtav1":
            options["svtav1-params"] = "lp=1"
        return options | dict(self.options)


@lru_cache(maxsize=4096)
def _converted(number: int, height: int, width: int, pix_fmt: str) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(cached_picture(number, height, width)), format="rgb24"
    )
    return frame.reformat(format=pix_fmt)


def _frames(film: Film) -> Iterator[av.VideoFrame]:
    for at, number in enumerate(film.numbers):
        frame = _converted(number, film.height, film.width, film.pix_fmt)
        frame.pts = film.times[at] if film.times else at
        frame.time_base = 1 / film.rate
        frame.pict_type = 0
        yield frame


def add_film(container: av.container.OutputContainer, film: Film) -> "av.VideoStream":
    """Add the stream of a film; its packets are made by `packets_of`."""
    stream = container.add_stream(film.encoder, rate=film.rate, options=film.encoder_options())
    assert isinstance(stream, av.VideoStream)
    stream.height, stream.width, stream.pix_fmt = film.height, film.width, film.pix_fmt
    stream.codec_context.thread_count = 1
    stream.time_base = stream.codec_context.time_base = 1 / film.rate
    return stream


def packets_of(stream: "av.VideoStream", film: Film) -> Iterator[av.Packet]:
    """Yield the packets of a film, encoded."""
    for frame in _frames(film):
        yield from stream.encode(frame)
    yield from stream.encode()


def add_sound(
    container: av.container.OutputContainer, codec: str, *, seconds: float
) -> Callable[[], Iterable[av.Packet]]:
    """Add a stream of silence, and return what yields its packets."""
    stream = container.add_stream(codec, rate=48000, options={"b": "96k"})

    def packets() -> Iterator[av.Packet]:
        size = 1024
        form = stream.codec_context.codec.audio_formats[0].name
        for at in range(round(seconds * 48000 / size)):
            frame = av.AudioFrame(format=form, layout="stereo", samples=size)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts, frame.time_base = 48000, at * size, Fraction(1, 48000)
            yield from stream.encode(frame)
        yield from stream.encode()

    return packets


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What a file holds beside its film, and how it is written.

    Attributes:
        film: the video stream.
        before, after: other streams: a `Film`, or the name of a codec of sound.
        container: FFmpeg's name of the format; None: by the suffix.
        options: of the muxer.
        start: ticks of the film that its first frame comes later than time 0.
        default: number of the stream that players shall choose; None: the muxer marks what it will.
        cover: number of the stream that is a still picture to show beside the file's name; None: no stream is.
    """

    film: Film
    before: tuple["Film | str", ...] = ()
    after: tuple["Film | str", ...] = ()
    container: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    start: int = 0
    default: int | None = None
    cover: int | None = None


def write_streams(path: Path, streams: Streams) -> None:
    """Write a file; equal arguments give equal bytes."""
    options = {"fflags": "bitexact", **dict(streams.options)}
    with av.open(str(path), "w", format=streams.container, options=options) as container:
        sources: list[Callable[[], Iterable[av.Packet]]] = []
        for other in (*streams.before, streams.film, *streams.after):
            if isinstance(other, Film):
                sources.append(_packets(add_film(container, other), other, streams.start))
            else:
                sources.append(add_sound(container, other, seconds=streams.film.frames / streams.film.rate))
        for number, stream in enumerate(container.streams):
            if streams.default is not None:
                stream.disposition = Disposition.default if number == streams.default else Disposition(0)
            if number == streams.cover:
                stream.disposition = Disposition.attached_pic
        for packets in sources:
            for packet in packets():
                container.mux(packet)


def _packets(stream: "av.VideoStream", film: Film, start: int) -> Callable[[], Iterable[av.Packet]]:
    def shifted() -> Iterator[av.Packet]:
        for packet in packets_of(stream, film):
            if start:
                ticks = round(start / film.rate / packet.time_base)
                packet.pts += ticks
                packet.dts += ticks
            yield packet

    return shifted


def copy_packets(
    source: Path,
    target: Path,
    keep: Callable[[list[av.Packet]], list[av.Packet]],
    *,
    container: str | None = None,
    options: dict[str, str] | None = None,
) -> None:
    """Write some of a file's packets to another file, without encoding.

    Args:
        source: has one video stream.
        target: is written.
        keep: returns the packets to write, of all in the order of the file.
        container: FFmpeg's name of the format; None: by the suffix.
        options: of the muxer.
    """
    with av.open(str(source)) as read:
        stream = read.streams.video[0]
        packets = [packet for packet in read.demux(stream) if packet.size]
        with av.open(
            str(target), "w", format=container, options={"fflags": "bitexact", **(options or {})}
        ) as written:
            copied = written.add_stream_from_template(stream)
            for packet in _with_start_codes(keep(packets), stream, target.suffix):
                packet.stream = copied
                written.mux(packet)


def _with_start_codes(packets: list[av.Packet], stream: "av.VideoStream", suffix: str) -> Iterable[av.Packet]:
    """Write units of H.264 and HEVC as containers without a header for them want it."""
    name = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}.get(stream.codec_context.name)
    if name is None or suffix not in (".ts", ".avi", ".m2ts"):
        return packets
    wanting = BitStreamFilterContext(name, stream)
    return [made for packet in (*packets, None) for made in wanting.filter(packet)]


def plain_linear_decode(path: Path) -> Iterator[np.ndarray]:
    """Yield every picture that a decode of FFmpeg's best video stream from its start shows, uint8 (H, W, 3).

    The truth that other decoders are compared with, so it is as plain as can be: one thread, no seek, no index. What
    comes before the first key frame, and so cannot be decoded, is left out.
    """
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        stream.codec_context.thread_count = 1
        has_shown = False
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                if has_shown:
                    raise
                continue
            for frame in frames:
                has_shown = True
                yield frame.to_ndarray(format="rgb24")
