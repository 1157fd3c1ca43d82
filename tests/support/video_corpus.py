"""Small healthy videos of the kinds that people have, whose frames show their numbers: a covering choice of

container x codec x kind of GOP x B-frames x start x edit list x streams x display matrix x size x pixels x fields x rate.

What a file must show is known from how it was made; `plain_linear_decode` confirms it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av

from tests.support.video_surgery import (
    ORIENTATIONS,
    cut_avi_index,
    cut_ts,
    damage_x264_note,
    orient,
    rename_boxes,
    scale_avi_length,
    scale_mkv_duration,
    scale_mp4_durations,
    set_edits,
)
from tests.support.video_writing import Film, Streams, copy_packets, write_streams

Options = tuple[tuple[str, str], ...]
X264 = tuple[tuple[str, str | int], ...]

# Kinds of GOP as H.264 and HEVC have them: name, frames from key to key, the encoder's own options.
_CLOSED_0: X264 = (("bframes", 0),)
_CLOSED_2: X264 = (("bframes", 2), ("b-adapt", 0), ("b-pyramid", "none"), ("open-gop", 0))
_PYRAMID: X264 = (("bframes", 3), ("b-adapt", 0), ("b-pyramid", "normal"), ("ref", 4), ("open-gop", 0))
_GOPS: dict[str, tuple[int, X264]] = {
    "closed-b0": (12, _CLOSED_0),
    "closed-b2": (12, _CLOSED_2),
    "closed-pyramid": (16, _PYRAMID),
    "open-b2": (12, (*_CLOSED_2[:3], ("open-gop", 1))),
    "open-pyramid": (16, (*_PYRAMID[:4], ("open-gop", 1))),
    "refresh-b0": (12, (("bframes", 0), ("intra-refresh", 1))),
    "refresh-b2": (12, (*_CLOSED_2, ("intra-refresh", 1))),
    "intra": (1, _CLOSED_0),
    "one-b0": (1000, _CLOSED_0),
    "one-b2": (1000, _CLOSED_2),
    "sliced-b2": (12, (*_CLOSED_2, ("slices", 4))),
    "long-b2": (30, _CLOSED_2),
}
_GOPS_265: dict[str, tuple[int, X264]] = {
    "closed-b0": (12, (("bframes", 0), ("open-gop", 0))),
    "closed-b2": (12, (("bframes", 2), ("b-adapt", 0), ("b-pyramid", 0), ("open-gop", 0))),
    "open-b2": (12, (("bframes", 2), ("b-adapt", 0), ("b-pyramid", 0), ("open-gop", 1))),
    "open-pyramid": (16, (("bframes", 3), ("b-adapt", 0), ("b-pyramid", 1), ("open-gop", 1))),
    "refresh-b0": (12, (("bframes", 0), ("intra-refresh", 1), ("open-gop", 0))),
    "intra": (1, (("bframes", 0),)),
    "one-b2": (1000, (("bframes", 2), ("b-adapt", 0), ("open-gop", 0))),
}
# The same of MPEG-1, 2 and 4, by FFmpeg's own options.
_OLDER_GOPS: dict[str, tuple[int, Options]] = {
    "closed-b0": (12, ()),
    "closed-b2": (12, (("bf", "2"), ("flags", "+cgop"), ("sc_threshold", "1000000000"))),
    "open-b2": (12, (("bf", "2"), ("b_strategy", "0"))),
    "open-b3": (15, (("bf", "3"), ("b_strategy", "0"))),
    "intra": (1, ()),
    "one-b0": (600, ()),
}


@dataclass(frozen=True, kw_only=True)
class NumberedFile:
    """One file of the corpus.

    Attributes:
        path: its name says what it is.
        numbers: what a decode from the start shows, in order.
        orientation: of the display matrix, a key of `ORIENTATIONS`.
        may_be_refused: whether something of it is lost or wrong, so that a refusal is right as well.
    """

    path: Path
    numbers: tuple[int, ...]
    orientation: str = "upright"
    may_be_refused: bool = False


def make_corpus(folder: Path) -> list[NumberedFile]:
    """Write all files and return them; equal in every run."""
    parts = (
        _h264,
        _hevc,
        _older,
        _other_codecs,
        _starts,
        _edits,
        _matrices,
        _several_streams,
        _sizes,
        _pixels,
    )
    parts += (_fields, _rates, _headers, _copies, _transport_streams, _notes, _muxers)
    made = [file for part in parts for file in part(folder)]
    assert len({file.path for file in made}) == len(made)
    return made


def h264(kind: str = "closed-b2", **changes: object) -> Film:
    """Return a film in H.264 whose GOPs are of a kind."""
    gop, own = _GOPS[kind]
    return replace(Film(gop=gop, x264=own), **changes)


def hevc(kind: str = "closed-b2", **changes: object) -> Film:
    """Return a film in HEVC whose GOPs are of a kind."""
    gop, own = _GOPS_265[kind]
    return replace(Film(encoder="libx265", gop=gop, x264=own), **changes)


def older(encoder: str, kind: str = "closed-b0", **changes: object) -> Film:
    """Return a film by one of FFmpeg's own encoders whose GOPs are of a kind."""
    gop, options = _OLDER_GOPS[kind]
    return replace(Film(encoder=encoder, gop=gop, options=options), **changes)


def _write(path: Path, film: Film, **streams: object) -> NumberedFile:
    write_streams(path, Streams(film=film, **streams))
    return NumberedFile(path=path, numbers=film.numbers)


def _h264(folder: Path) -> Iterator[NumberedFile]:
    for kind in _GOPS:
        for suffix in ("mp4", "mkv", "ts", "avi"):
            yield _write(folder / f"h264-{kind}.{suffix}", h264(kind))
    for kind in ("closed-b0", "open-b2", "refresh-b0"):
        yield _write(folder / f"h264-{kind}.flv", h264(kind))
        yield _write(folder / f"h264-{kind}.mov", h264(kind))
    yield _write(folder / "h264-closed-b0.3gp", h264("closed-b0"))
    yield _write(folder / "h264-open-b2.m2ts", h264("open-b2"))
    yield _write(folder / "h264-closed-b2.wmv", h264())
    yield _write(folder / "h264-closed-b2.h264", h264())
    yield _write(folder / "h264-closed-b2.mpg", h264(), container="vob")


def _hevc(folder: Path) -> Iterator[NumberedFile]:
    for kind in _GOPS_265:
        suffixes = ("mp4", "ts") if kind.startswith("open") else ("mkv",) if kind == "one-b2" else ("mp4",)
        for suffix in suffixes:
            yield _write(folder / f"hevc-{kind}.{suffix}", hevc(kind))


def _older(folder: Path) -> Iterator[NumberedFile]:
    wanted = {
        "mpeg4": {"avi": ("closed-b0", "closed-b2", "open-b2", "open-b3", "intra", "one-b0"), "mp4": ("closed-b0", "open-b2"),
                  "mkv": ("open-b2",), "ts": ("open-b2",), "3gp": ("closed-b0",), "nut": ("open-b2",)},
        "mpeg2video": {"mpg": ("closed-b0", "closed-b2", "open-b2"), "ts": ("closed-b2", "open-b3"), "mkv": ("open-b2",),
                       "mp4": ("open-b2",), "vob": ("open-b2",), "avi": ("open-b2",), "m2v": ("open-b2",)},
        "mpeg1video": {"mpg": ("closed-b0", "open-b2"), "mkv": ("open-b2",), "ts": ("open-b2",), "avi": ("closed-b0",)},
        "wmv1": {"wmv": ("closed-b0",)},
        "wmv2": {"wmv": ("closed-b0", "one-b0"), "avi": ("closed-b0",)},
        "msmpeg4": {"avi": ("closed-b0",), "mkv": ("closed-b0",)},
        "msmpeg4v2": {"avi": ("closed-b0",)},
        "flv": {"flv": ("closed-b0", "one-b0")},
        "rv20": {"rm": ("closed-b0",)},
    }  # fmt: skip
    for encoder, containers in wanted.items():
        for suffix, kinds in containers.items():
            for kind in kinds:
                yield _write(folder / f"{encoder}-{kind}.{suffix}", older(encoder, kind))


def _other_codecs(folder: Path) -> Iterator[NumberedFile]:
    for suffix in ("webm", "mkv", "ivf"):
        yield _write(folder / f"vp8.{suffix}", Film(encoder="libvpx"))
    alt = (("auto-alt-ref", "1"), ("lag-in-frames", "12"), ("deadline", "good"))
    yield _write(folder / "vp8-hidden-frames.webm", Film(encoder="libvpx", gop=25, options=alt))
    for suffix in ("webm", "mp4", "ivf"):
        yield _write(folder / f"vp9.{suffix}", Film(encoder="libvpx-vp9"))
    yield _write(folder / "vp9-hidden-frames.webm", Film(encoder="libvpx-vp9", gop=25, options=alt))
    yield _write(folder / "vp9-hidden-frames.mkv", Film(encoder="libvpx-vp9", gop=25, options=alt))
    for suffix in ("mp4", "webm", "ivf"):
        yield _write(folder / f"av1.{suffix}", Film(encoder="libsvtav1", gop=25))
    for suffix in ("avi", "mov", "mkv"):
        yield _write(folder / f"mjpeg.{suffix}", Film(encoder="mjpeg", pix_fmt="yuvj420p"))
    for encoder, suffix, pix_fmt in (
        ("prores", "mov", "yuv422p10le"),
        ("ffv1", "mkv", "yuv420p"),
        ("huffyuv", "avi", "yuv422p"),
        ("rawvideo", "avi", "yuv420p"),
        ("qtrle", "mov", "rgb24"),
        ("svq1", "mov", "yuv410p"),
        ("jpeg2000", "mkv", "yuv420p"),
        ("gif", "gif", "rgb8"),
        ("libx264rgb", "mp4", "rgb24"),
    ):
        yield _write(folder / f"{encoder}.{suffix}", Film(encoder=encoder, pix_fmt=pix_fmt, frames=40))


def _starts(folder: Path) -> Iterator[NumberedFile]:
    """Files whose first frame does not come at time 0."""
    for suffix in ("mp4", "mkv", "ts", "flv", "mpg"):
        film = older("mpeg2video", "open-b2") if suffix == "mpg" else h264()
        yield _write(folder / f"late-b2.{suffix}", film, start=125)
        yield _write(folder / f"very-late-b2.{suffix}", film, start=25 * 3600 * 5)
    keep = (("avoid_negative_ts", "disabled"),)
    for suffix in ("mkv", "flv"):
        yield _write(folder / f"negative-b0.{suffix}", h264("closed-b0"), start=-13, options=keep)
        yield _write(folder / f"negative-b2.{suffix}", h264("closed-b2"), start=-13, options=keep)
    # Where the muxer of mp4 meets negative times, it writes an edit list that hides them.
    made = _write(folder / "negative-b2.mp4", h264("closed-b2"), start=-13, options=keep)
    yield replace(made, numbers=tuple(range(13, 60)))


def _edits(folder: Path) -> Iterator[NumberedFile]:
    """Edit lists: frames that a file holds and does not show."""
    cases: dict[str, list[tuple[int | None, int]]] = {
        "no-list": [],
        "hide-head5": [(5, 55)],
        "hide-head37": [(37, 23)],
        "hide-tail": [(0, 41)],
        "hide-both": [(7, 40)],
        "empty-first": [(None, 50), (0, 60)],
        "empty-first-hide-head": [(None, 50), (9, 51)],
        "two-parts": [(0, 20), (36, 24)],
        "two-parts-within-gops": [(5, 20), (40, 15)],
        "from-key": [(24, 36)],
    }
    for name, edits in cases.items():
        for kind in ("closed-b0", "closed-b2", "open-b2"):
            made = _write(folder / f"edit-{name}-{kind}.mp4", h264(kind))
            set_edits(made.path, edits, version=int(name == "hide-both"))
            shown = tuple(
                n for first, count in edits if first is not None for n in range(first, first + count)
            )
            yield replace(made, numbers=shown or made.numbers)
    for film, name in (
        (hevc("open-b2"), "hevc"),
        (older("mpeg4", "open-b2"), "mpeg4"),
        (Film(encoder="libvpx-vp9"), "vp9"),
    ):
        made = (
            _write(folder / f"edit-hide-head5-{name}.mov", film)
            if name == "mpeg4"
            else _write(folder / f"edit-hide-head5-{name}.mp4", film)
        )
        set_edits(made.path, [(5, 50)])
        yield replace(made, numbers=tuple(range(5, 55)))


def _matrices(folder: Path) -> Iterator[NumberedFile]:
    for orientation in ORIENTATIONS:
        for name, film in (("h264", h264("closed-b0")), ("mpeg4", older("mpeg4", "open-b2"))):
            made = _write(folder / f"matrix-{orientation}-{name}.mp4", film)
            orient(made.path, orientation)
            yield replace(made, orientation=orientation)
    for orientation in ("turned90", "transverse"):
        made = _write(folder / f"matrix-{orientation}-hevc.mov", hevc())
        orient(made.path, orientation)
        yield replace(made, orientation=orientation)


def _several_streams(folder: Path) -> Iterator[NumberedFile]:
    film = h264()
    other = h264("open-b2", first=1000, height=144, width=192)
    cover = Film(encoder="mjpeg", pix_fmt="yuvj420p", frames=1, first=3000, height=288, width=384)
    for suffix in ("mp4", "mkv", "ts", "mov"):
        yield _write(folder / f"sound-after.{suffix}", film, after=("aac",))
        yield _write(folder / f"sound-before.{suffix}", film, before=("aac",))
    for suffix in ("mp4", "mkv", "mov"):
        for default, place in enumerate(("first", "second")):
            made = _write(
                folder / f"two-videos-{place}-is-default.{suffix}", film, after=(other,), default=default
            )
            yield replace(made, numbers=(film, other)[default].numbers)
    # Nothing in a transport stream says which is meant: FFmpeg takes the first of two that are as long.
    yield _write(folder / "two-videos.ts", film, after=(other,))
    made = _write(folder / "three-videos-last-is-default.mkv", film, before=(other, other), default=2)
    yield made
    yield _write(folder / "two-sounds.mkv", film, before=("aac",), after=("aac",))
    yield _write(folder / "sound.avi", older("mpeg4", "open-b2"), after=("mp2",))
    yield _write(folder / "sound.mpg", older("mpeg2video", "open-b2"), after=("mp2",))
    yield _write(folder / "sound.flv", h264("open-b2"), after=("aac",))
    yield _write(folder / "sound.wmv", older("wmv2"), after=("wmav2",))
    yield _write(folder / "sound.webm", Film(encoder="libvpx-vp9"), after=("libopus",))
    for suffix in ("mp4", "mkv"):
        yield _write(folder / f"cover-first.{suffix}", film, before=(cover,), cover=0)
        yield _write(folder / f"cover-last.{suffix}", film, after=(cover,), cover=1)
        yield _write(folder / f"cover-first-unmarked.{suffix}", film, before=(cover,), default=1)


def _sizes(folder: Path) -> Iterator[NumberedFile]:
    """Sizes that are no multiple of 16, and odd ones."""
    even, odd = {"height": 98, "width": 134}, {"height": 97, "width": 131}
    for name, film in (
        ("h264", h264()),
        ("mpeg4", older("mpeg4", "open-b2")),
        ("vp9", Film(encoder="libvpx-vp9")),
    ):
        suffix = {"h264": "mp4", "mpeg4": "avi", "vp9": "webm"}[name]
        yield _write(folder / f"size-even-{name}.{suffix}", replace(film, **even))
    yield _write(folder / "size-odd-vp8.webm", Film(encoder="libvpx", **odd))
    yield _write(folder / "size-odd-vp9.webm", Film(encoder="libvpx-vp9", **odd))
    yield _write(folder / "size-odd-mpeg4.avi", older("mpeg4", "open-b2", **odd))
    yield _write(folder / "size-odd-mpeg2.mpg", older("mpeg2video", "open-b2", **odd))
    yield _write(folder / "size-odd-mjpeg.avi", Film(encoder="mjpeg", pix_fmt="yuvj420p", **odd))
    yield _write(folder / "size-odd-h264-444.mp4", h264(pix_fmt="yuv444p", **odd))
    yield _write(folder / "size-odd-ffv1.mkv", Film(encoder="ffv1", frames=40, **odd))
    yield _write(folder / "size-odd-width-h264-422.mp4", h264(pix_fmt="yuv422p", height=97, width=132))
    yield _write(folder / "size-large.mp4", h264(height=272, width=480, frames=30))


def _pixels(folder: Path) -> Iterator[NumberedFile]:
    for pix_fmt in ("yuv420p10le", "yuv444p", "yuvj420p", "yuv422p", "yuv422p10le", "gray"):
        yield _write(folder / f"pixels-{pix_fmt}-h264.mp4", h264(pix_fmt=pix_fmt))
    for pix_fmt in ("yuv420p10le", "yuv444p"):
        yield _write(folder / f"pixels-{pix_fmt}-hevc.mp4", hevc(pix_fmt=pix_fmt))
    yield _write(folder / "pixels-yuv444p-vp9.webm", Film(encoder="libvpx-vp9", pix_fmt="yuv444p"))
    yield _write(
        folder / "pixels-yuv420p10le-av1.mp4", Film(encoder="libsvtav1", pix_fmt="yuv420p10le", gop=25)
    )
    yield _write(
        folder / "pixels-alpha-vp9.webm",
        Film(encoder="libvpx-vp9", pix_fmt="yuva420p", options=(("auto-alt-ref", "0"),)),
    )
    for matrix in ("bt709", "bt2020nc", "smpte170m"):
        own = (*h264().x264, ("colormatrix", matrix), ("colorprim", "bt709"), ("transfer", "bt709"))
        yield _write(folder / f"colours-{matrix}.mp4", h264(x264=own))
    yield _write(folder / "colours-full-range-flag.mp4", h264(x264=(*h264().x264, ("fullrange", "on"))))
    yield _write(folder / "not-square.mp4", h264(x264=(*h264().x264, ("sar", "4:3"))))


def _fields(folder: Path) -> Iterator[NumberedFile]:
    """Interlaced pictures."""
    for order in ("tff", "bff"):
        for suffix in ("mp4", "mkv", "ts"):
            own = (*h264().x264, (order, 1))
            yield _write(folder / f"fields-mbaff-{order}.{suffix}", h264(x264=own, interlaced=True))
    own = (*h264("open-b2").x264, ("tff", 1))
    yield _write(folder / "fields-mbaff-open.ts", h264("open-b2", x264=own, interlaced=True))
    yield _write(folder / "fields-flag-only.mp4", h264(x264=(*h264().x264, ("fake-interlaced", 1))))
    for encoder, suffix in (
        ("mpeg2video", "mpg"),
        ("mpeg2video", "ts"),
        ("mpeg2video", "mkv"),
        ("mpeg4", "avi"),
    ):
        film = older(encoder, "open-b2", interlaced=True)
        film = replace(film, options=(*film.options, ("flags", "+ildct+ilme")))
        yield _write(folder / f"fields-{encoder}.{suffix}", film)


def _rates(folder: Path) -> Iterator[NumberedFile]:
    """Frames that do not come evenly, and rates that are no whole numbers."""
    uneven = tuple(n + n * n // 20 for n in range(60))
    gap = tuple(n + 300 * (n >= 30) for n in range(60))
    for suffix in ("mp4", "mkv", "ts", "flv"):
        yield _write(folder / f"rate-uneven.{suffix}", h264(times=uneven))
        yield _write(folder / f"rate-gap.{suffix}", h264("open-b2", times=gap))
    yield _write(folder / "rate-uneven.webm", Film(encoder="libvpx-vp9", times=uneven))
    yield _write(
        folder / "rate-uneven-never-coded.avi",
        older("mpeg4", "closed-b0", times=tuple(2 * n for n in range(60))),
    )
    yield _write(folder / "rate-uneven.wmv", older("wmv2", times=uneven))
    for suffix in ("mp4", "mkv", "avi", "ts"):
        yield _write(folder / f"rate-ntsc.{suffix}", h264(rate=Fraction(30000, 1001)))
    yield _write(folder / "rate-1.mp4", h264(rate=Fraction(1), frames=30))
    yield _write(folder / "rate-240.mkv", h264(rate=Fraction(240)))


def _headers(folder: Path) -> Iterator[NumberedFile]:
    """Healthy files whose headers say another length."""
    for name, factor in (("longer", 3.0), ("shorter", 0.4)):
        made = _write(folder / f"header-{name}.mkv", h264())
        scale_mkv_duration(made.path, factor)
        yield made
        made = _write(folder / f"header-{name}.webm", Film(encoder="libvpx-vp9"))
        scale_mkv_duration(made.path, factor)
        yield made
        made = _write(folder / f"header-{name}-mvhd-tkhd.mp4", h264("closed-b0"))
        set_edits(made.path, [])
        scale_mp4_durations(made.path, factor, ("mvhd", "tkhd"))
        yield made
        made = _write(folder / f"header-{name}-mdhd.mp4", h264("closed-b0"))
        set_edits(made.path, [])
        scale_mp4_durations(made.path, factor, ("mdhd",))
        yield made
        for boxes in (("avih",), ("strh",), ("avih", "strh")):
            made = _write(folder / f"header-{name}-{'-'.join(boxes)}.avi", older("mpeg4", "open-b2"))
            scale_avi_length(made.path, factor, boxes=boxes)
            yield made


def _copies(folder: Path) -> Iterator[NumberedFile]:
    """Streams cut without encoding: from the second key frame on, and with packets left out."""
    films = {
        "h264-closed": (h264("closed-b2"), ("mp4", "mkv", "ts", "avi")),
        "h264-open": (h264("open-b2"), ("mp4", "mkv", "ts")),
        "h264-open-pyramid": (h264("open-pyramid"), ("mp4", "mkv")),
        "hevc-open": (hevc("open-b2"), ("mp4", "mkv", "ts")),
        "mpeg2-open": (older("mpeg2video", "open-b2"), ("mkv", "ts", "mpg")),
        "mpeg4-open": (older("mpeg4", "open-b2"), ("avi", "mkv", "mp4")),
        "vp9": (Film(encoder="libvpx-vp9"), ("webm",)),
    }
    for name, (film, suffixes) in films.items():
        for suffix in suffixes:
            # Of a transport stream, as there each key frame comes with what a decoder must know before it.
            source = folder / f"whole-{name}-for-{suffix}.{'ts' if suffix in ('ts', 'avi', 'mpg') else 'mkv'}"
            yield _write(source, film)
            path = folder / f"from-second-key-{name}.{suffix}"
            copy_packets(source, path, lambda packets: packets[_keys(packets)[1] :])
            yield NumberedFile(path=path, numbers=film.numbers[_key_frames(source)[1][1] :])
    for suffix in ("mp4", "mkv", "ts"):
        source = folder / f"whole-h264-closed-for-{suffix}.{'ts' if suffix == 'ts' else 'mkv'}"
        path = folder / f"without-second-gop.{suffix}"
        copy_packets(source, path, _without_second_gop)
        keys = [number for _, number in _key_frames(source)]
        yield NumberedFile(path=path, numbers=(*range(keys[1]), *range(keys[2], 60)))
        path = folder / f"without-b-frames.{suffix}"
        copy_packets(source, path, _without_b_frames)
        yield NumberedFile(path=path, numbers=tuple(n for n in range(60) if n % 12 == 11 or n % 12 % 3 == 0))


def _without_second_gop(packets: list[av.Packet]) -> list[av.Packet]:
    keys = _keys(packets)
    return packets[: keys[1]] + packets[keys[2] :]


def _without_b_frames(packets: list[av.Packet]) -> list[av.Packet]:
    """Those that no packet before them is shown later than."""
    latest, kept = None, []
    for packet in packets:
        if latest is None or packet.pts > latest:
            latest = packet.pts
            kept.append(packet)
    return kept


def _at_times_of_decoding(packets: list[av.Packet]) -> list[av.Packet]:
    for packet, time in zip(packets, sorted(packet.pts for packet in packets), strict=True):
        packet.pts = packet.dts = time
    return packets


def _keys(packets: list[av.Packet]) -> list[int]:
    return [at for at, packet in enumerate(packets) if packet.is_keyframe]


def _key_frames(path: Path) -> list[tuple[int, int]]:
    """The places of a file's key frames in the file, and their places in the order of showing."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    times = sorted(packet.pts for packet in packets)
    return [(at, times.index(packets[at].pts)) for at in _keys(packets)]


def _transport_streams(folder: Path) -> Iterator[NumberedFile]:
    """Joined and cut ones."""
    films = {"h264": h264(), "h264-open": h264("open-b2"), "mpeg2": older("mpeg2video", "open-b2")}
    for name, film in films.items():
        later = replace(film, first=500)
        one, other = folder / f"part-one-{name}.ts", folder / f"part-two-{name}.ts"
        yield _write(one, film)
        yield _write(other, later)
        path = folder / f"joined-{name}.ts"
        path.write_bytes(one.read_bytes() + other.read_bytes())
        yield NumberedFile(path=path, numbers=film.numbers + later.numbers)
        place, number = _key_frames(one)[2]
        made = _write(folder / f"cut-at-key-{name}.ts", film)
        cut_ts(made.path, place)
        yield replace(made, numbers=film.numbers[number:])
        # What comes before the first key frame cannot be shown, which a decoder may well complain of.
        made = _write(folder / f"cut-within-gop-{name}.ts", film)
        cut_ts(made.path, place - 5)
        yield replace(made, numbers=film.numbers[number:], may_be_refused=True)
    one, other = folder / "part-one-mpeg2.mpg", folder / "part-two-mpeg2.mpg"
    yield _write(one, films["mpeg2"])
    yield _write(other, replace(films["mpeg2"], first=500))
    path = folder / "joined-mpeg2.mpg"
    path.write_bytes(one.read_bytes() + other.read_bytes())
    yield NumberedFile(path=path, numbers=(*range(60), *range(500, 560)))


def _notes(folder: Path) -> Iterator[NumberedFile]:
    """One byte of a message beside the pictures is wrong."""
    for how in ("size", "text", "uuid"):
        for suffix in ("mp4", "mkv", "ts"):
            made = _write(folder / f"note-{how}.{suffix}", h264("long-b2"))
            damage_x264_note(made.path, how=how)
            yield made


def _muxers(folder: Path) -> Iterator[NumberedFile]:
    """Other ways to write the same container."""
    yield _write(folder / "mp4-fragments.mp4", h264(), options=(("movflags", "frag_keyframe+empty_moov"),))
    yield _write(
        folder / "mp4-fragments-of-frames.mp4",
        h264("open-b2"),
        options=(("movflags", "frag_every_frame+empty_moov"),),
    )
    yield _write(folder / "mp4-dash.mp4", h264(), options=(("movflags", "dash+delay_moov"),))
    yield _write(folder / "mp4-header-first.mp4", h264(), options=(("movflags", "faststart"),))
    yield _write(folder / "mp4-negative-offsets.mp4", h264(), options=(("movflags", "negative_cts_offsets"),))
    yield _write(folder / "mkv-live.mkv", h264(), options=(("live", "1"),))
    yield _write(folder / "mkv-short-clusters.mkv", h264("open-b2"), options=(("cluster_time_limit", "100"),))
    yield _write(
        folder / "mp4-below-zero.mp4",
        h264(),
        start=-13,
        options=(("movflags", "dash+delay_moov"), ("avoid_negative_ts", "disabled")),
    )
    # Without the table of key frames; without that of when frames are shown, which differs from when they are decoded.
    for name, film in (("h264", h264()), ("hevc", hevc()), ("mpeg4", older("mpeg4", "closed-b2"))):
        made = _write(folder / f"mp4-without-stss-{name}.mp4", film)
        rename_boxes(made.path, "stss")
        yield made
        made = _write(folder / f"mp4-without-ctts-{name}.mp4", film)
        rename_boxes(made.path, "ctts", "edts")
        yield made
        copy = folder / f"mkv-times-of-decoding-{name}.mkv"
        copy_packets(_write(folder / f"whole-for-times-{name}.mkv", film).path, copy, _at_times_of_decoding)
        yield replace(made, path=copy)
    made = _write(folder / "mp4-without-stss-b0.mp4", h264("closed-b0"))
    rename_boxes(made.path, "stss")
    yield made
    made = _write(folder / "avi-without-index.avi", older("mpeg4", "open-b2"))
    cut_avi_index(made.path)
    yield made
    made = _write(folder / "colon: 12:30:05.mp4", h264())
    yield made
