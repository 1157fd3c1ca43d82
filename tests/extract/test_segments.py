"""Segments of long videos: which frames they are, by drawn numbers, whatever the file; and decoded together to the same bits."""

import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.clips import Clip, ClipList, Segment, select
from evl_cache.errors import Outage, TooManyFailures, UsageError
from evl_cache.extract import outages
from evl_cache.extract.failure_limit import FailureCount
from evl_cache.extract.outages import Surroundings
from evl_cache.extract.prepare import PreparedClip, choose_frames, prepare_clip, prepare_clips
from evl_cache.extract.segments import rows_by_video
from evl_cache.spec import ViewSpec
from evl_cache.store import ClipRecord
from evl_cache.video import Choose, DecodeOptions, FrameEvent, decode_clip, decode_frames
from evl_cache.video.pool import DecodePool
from tests.support.segmented_films import LongFilm, clip_of, plain_views, shown_by, square, tower

VIEWS = ViewSpec(frames=3, stride=4)
B_FRAMES = (("bframes", 2),)
NTSC = Fraction(60000, 1001)
_RNG = random.Random(7)
UNEVEN = tuple(np.cumsum([0, *(_RNG.choice((7, 20, 33, 60)) for _ in range(89))]).tolist())

FILMS = (
    LongFilm(name="b.mp4", film=square(frames=120, x264=B_FRAMES)),
    LongFilm(name="24.mp4", film=square(frames=120, rate=Fraction(24))),
    LongFilm(name="ntsc.mp4", film=square(frames=150, rate=NTSC, x264=B_FRAMES)),
    LongFilm(name="ntsc.mkv", film=square(frames=150, rate=NTSC), tick=Fraction(1, 1000)),
    LongFilm(name="uneven.mp4", film=square(frames=90, rate=Fraction(600), times=UNEVEN)),
    LongFilm(name="late.mkv", film=square(frames=120), start=37, tick=Fraction(1, 1000)),
    LongFilm(name="late.ts", film=square(frames=120, x264=B_FRAMES), start=50),
    LongFilm(name="xvid.avi", film=square(frames=120, encoder="mpeg4", options=(("bf", "2"),))),
    LongFilm(name="plain.avi", film=square(frames=120, encoder="mpeg4", rate=Fraction(30))),
    LongFilm(name="vp8.webm", film=square(frames=120, encoder="libvpx"), tick=Fraction(1, 1000)),
    LongFilm(name="mpeg2.mpg", film=square(frames=120, encoder="mpeg2video", options=(("bf", "2"),))),
    LongFilm(name="bare.h264", film=square(frames=120), container="h264"),
)
SECONDS = [
    (0.0, 0.5),
    (0.0, None),
    (1.0, 1.5),
    (1.5, 2.5),
    (0.9, 99.0),
    (1.25, None),
    (0.321, 1.777),
    (1.001, 1.668334),
]
FRAMES = [(0, 10), (30, 60), (7, 8), (80, None), (59, 5000)]
SEGMENTS = [Segment(unit="seconds", start=a, end=b) for a, b in SECONDS] + [
    Segment(unit="frames", start=a, end=b) for a, b in FRAMES
]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for film in FILMS:
        film.write(folder)
    return folder


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(1) as opened:
        yield opened


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed, one after another."""
    files: list[Path] = []
    real = outages.sha256_of
    monkeypatch.setattr(outages, "sha256_of", lambda at: files.append(at) or real(at))
    return files


def prepared(
    clips: Sequence[Clip], folder: Path, pool: DecodePool, views: ViewSpec = VIEWS
) -> list[PreparedClip]:
    return prepare_clips(clips, folder, tower=tower(), views=views, decode=pool.frames)


def same(one: PreparedClip, other: PreparedClip) -> bool:
    if one.samples is None or other.samples is None:
        return one.record == other.record and one.samples is other.samples
    return one.record == other.record and torch.equal(one.samples, other.samples)


@pytest.mark.parametrize("film", FILMS, ids=lambda film: film.name)
def test_a_segment_has_the_frames_that_are_shown_within_it(
    film: LongFilm, films: Path, pool: DecodePool
) -> None:
    views = ViewSpec(frames=3, stride=4, temporal_views=2)
    clips = [clip_of(films / film.name, segment) for segment in SEGMENTS]
    for clip, found in zip(clips, prepared(clips, films, pool, views), strict=True):
        assert clip.segment is not None
        frames = film.frames_of(clip.segment)
        expected = plain_views(frames, views)
        assert found.record.error is None and found.record.frame_count == film.film.frames, clip.id
        assert [list(view) for view in found.record.indices or ()] == expected, clip.id
        assert shown_by(found) == expected, clip.id


@pytest.mark.parametrize("name", ["b.mp4", "uneven.mp4", "late.ts", "xvid.avi"])
@pytest.mark.parametrize(
    "views",
    [
        ViewSpec(frames=4, stride=3, temporal_views=2, spatial_views=3),
        ViewSpec(frames=4, stride=None, sampling="tsn"),
        ViewSpec(frames=3, stride=2, train_views=2, augment_seed=5, flip=True),
        ViewSpec(frames=3, stride=None, sampling="tsn", train_views=1),
    ],
    ids=["test", "tsn", "train", "tsn-train"],
)
def test_together_they_are_to_the_bit_what_each_is_alone(
    name: str, views: ViewSpec, films: Path, pool: DecodePool
) -> None:
    overlapping = [Segment(unit="frames", start=20 + n, end=40 + 2 * n) for n in range(4)]
    beyond = Segment(unit="seconds", start=500.0, end=510.0)
    clips = [clip_of(films / name, segment) for segment in (*SEGMENTS[:6], beyond, *overlapping, None)]
    together = prepared(clips, films, pool, views)
    alone = [prepare_clip(clip, films, tower=tower(), views=views, decode=pool.frames) for clip in clips]
    assert [clip.id for clip, a, b in zip(clips, together, alone, strict=True) if not same(a, b)] == []
    assert sum(clip.record.error is not None for clip in together) == 1


def test_views_of_a_segment_are_those_of_a_file_of_as_many_frames(films: Path, pool: DecodePool) -> None:
    views = ViewSpec(frames=3, stride=2, train_views=3, augment_seed=2)
    clip = clip_of(films / "b.mp4", Segment(unit="frames", start=40, end=75))
    (found,) = prepared([clip], films, pool, views)
    assert np.array_equal(np.asarray(found.record.indices), choose_frames(35, views, clip.id) + 40)


def test_segments_that_meet_share_no_frame_and_lose_none(films: Path, pool: DecodePool) -> None:
    every = ViewSpec(frames=150, stride=1)
    bounds = [0.0, 0.7, 1.001, 1.668333, 1.668334, 2.0]
    pieces = [
        Segment(unit="seconds", start=a, end=b) for a, b in zip(bounds, [*bounds[1:], None], strict=True)
    ]
    found = prepared([clip_of(films / "ntsc.mp4", piece) for piece in pieces], films, pool, every)
    seen = [sorted({i for view in clip.record.indices or () for i in view}) for clip in found]
    assert [i for part in seen for i in part] == list(range(150))
    assert seen[1][-1] == 59 and seen[2][0] == 60  # frame 60 is shown at 1.001 s
    assert seen[3] == [] or seen[3][0] >= 100  # frame 100 at 1.668333.. s counts from 1.668333 on


@pytest.mark.parametrize("name", ["b.mp4", "xvid.avi"])
def test_a_segment_without_a_frame_fails_alone_and_says_why(name: str, films: Path, pool: DecodePool) -> None:
    whole = Segment(unit="seconds", start=0.0)
    wrong = [
        Segment(unit="seconds", start=4.8, end=6.0),
        Segment(unit="seconds", start=0.05, end=0.07),
        Segment(unit="frames", start=120.0),
    ]
    clips = [clip_of(films / name, segment) for segment in (whole, *wrong)]
    first, *others = prepared(clips, films, pool)
    assert first.record.error is None
    for clip, found in zip(clips[1:], others, strict=True):
        assert found.samples is None and found.record.source_sha256 is not None
        assert str(clip.segment) in found.record.error and "the video has 120 frames" in found.record.error
    assert "the last at 4.760 s" in others[0].record.error


def test_a_file_that_says_no_times_and_no_rate_takes_segments_in_frames(
    films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evl_cache.video import shown
    from evl_cache.video.packets import Packets

    packets = Packets(count=3, codec="h264", frame_bytes=1)
    with pytest.raises(Exception, match="give its segments in frames"):
        shown.seconds_of(packets)


class Counted:
    """A decoder that counts what it is asked for."""

    def __init__(self) -> None:
        self.decodes: list[Path] = []

    def __call__(self, path: Path, choose: Choose) -> Iterator[FrameEvent]:
        self.decodes.append(path)
        return decode_frames(path, choose)


def test_segments_are_decoded_once_and_hashed_once(
    films: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.mp4"
    shutil.copyfile(films / "b.mp4", path)
    monkeypatch.setattr(outages, "_SETTLED_NS", -(1 << 62))
    decode, around = Counted(), Surroundings(tmp_path)
    how = {"tower": tower(), "views": VIEWS, "decode": decode, "surroundings": around}
    clips = [clip_of(path, segment) for segment in SEGMENTS]
    before = prepare_clips(clips, tmp_path, **how)
    assert len(decode.decodes) == 1 and len(hashed) == 1
    prepare_clips(clips[:3], tmp_path, **how)  # of the next block
    assert len(decode.decodes) == 2 and len(hashed) == 1
    shutil.copyfile(films / "24.mp4", path)  # another file, as where a video is fetched again
    after = prepare_clips(clips, tmp_path, **how)
    assert len(hashed) == 2 and after[0].record.source_sha256 != before[0].record.source_sha256


def test_a_bad_video_of_many_segments_is_read_a_few_times(
    films: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    segments = [Segment(unit="frames", start=n, end=n + 3) for n in range(0, 60, 3)]
    (tmp_path / "bad.mp4").write_bytes((films / "b.mp4").read_bytes()[:9000])
    shutil.copyfile(films / "b.mp4", tmp_path / "short.mp4")
    for name, clips, most_decodes in (
        ("bad.mp4", segments, 80),
        ("short.mp4", [replace(s, start=s.start + 500, end=s.end + 500) for s in segments], 1),
    ):
        hashed.clear()
        decode = Counted()
        failed = prepare_clips(
            [clip_of(tmp_path / name, segment) for segment in clips],
            tmp_path,
            tower=tower(),
            views=VIEWS,
            decode=decode,
        )
        assert all(clip.record.error and clip.samples is None for clip in failed)
        assert len(hashed) <= 3 and len(decode.decodes) <= most_decodes


def test_segments_of_one_bad_video_stop_no_run() -> None:
    def failed(n: int, sha256: str, reason: str) -> ClipRecord:
        return ClipRecord(id=str(n), source_sha256=sha256, source_bytes=1, error=reason)

    good = [ClipRecord(id=f"good {n}") for n in range(50)]
    truncated = [
        failed(n, "a", f"segment {n}-{n + 1} (seconds) holds no frame: the video has 5") for n in range(60)
    ]
    count = FailureCount().after([*good, *truncated])
    count.check(Path("c"))
    assert (count.failed, count.failed_apart, count.most_in_a_row) == (60, 1, 1)
    FailureCount().after(truncated).check_start()
    others = [failed(n, str(n), f"{n}.mp4: is cut off") for n in range(60)]
    with pytest.raises(TooManyFailures, match="60 of 110 clips failed, 60 in a row"):
        FailureCount().after([*good, *others]).check(Path("c"))


def test_what_changed_a_moment_ago_is_hashed_again(films: Path, tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "b.mp4"
    shutil.copyfile(films / "b.mp4", path)
    around = Surroundings(tmp_path)
    os.utime(path, (1, 1))  # as `rsync -t` leaves it; that it was laid down just now is told by its entry
    assert around.hash_once(path) == around.hash_once(path) and len(hashed) == 2


def test_a_file_that_changes_while_it_is_decoded_is_an_outage(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.mp4"
    shutil.copyfile(films / "b.mp4", path)
    monkeypatch.setattr(outages, "_SETTLED_NS", -(1 << 62))

    def decode(at: Path, choose: Choose) -> Iterator[FrameEvent]:
        path.write_bytes(path.read_bytes()[:9000])
        return decode_frames(at, choose)

    with pytest.raises(Outage, match="changes while it is read"):
        prepare_clips(
            [clip_of(path, segment) for segment in SEGMENTS],
            tmp_path,
            tower=tower(),
            views=VIEWS,
            decode=decode,
        )


def test_damage_fails_the_segments_that_want_it(films: Path, tmp_path: Path) -> None:
    content = bytearray((films / "late.ts").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path = tmp_path / "late.ts"
    path.write_bytes(content)
    clips = [clip_of(path, Segment(unit="frames", start=n, end=n + 8)) for n in range(0, 112, 8)]
    decode = Counted()
    views = ViewSpec(frames=2, stride=4)
    together = prepare_clips(clips, tmp_path, tower=tower(), views=views, decode=decode)
    few = len(decode.decodes)
    alone = [prepare_clip(clip, tmp_path, tower=tower(), views=views, decode=decode) for clip in clips]
    assert all(map(same, together, alone))
    assert 0 < sum(clip.samples is None for clip in together) < len(clips) and few > 1


@pytest.mark.parametrize("decoder", ["auto", "decord", "torchcodec"])
def test_every_decoder_serves_them(decoder: str, films: Path) -> None:
    try:
        options = DecodeOptions(decoder=decoder)
    except UsageError:
        pytest.skip(f"{decoder} is not installed")
    clips = [clip_of(films / "ntsc.mp4", segment) for segment in SEGMENTS[:4]]
    film = next(film for film in FILMS if film.name == "ntsc.mp4")
    with DecodePool(1, options=options) as pool:
        for clip, found in zip(clips, prepared(clips, films, pool), strict=True):
            assert clip.segment is not None
            assert shown_by(found) == plain_views(film.frames_of(clip.segment), VIEWS)


def test_rows_are_grouped_by_video_and_no_more_than_memory_allows() -> None:
    segment = Segment(unit="frames", start=0, end=5)
    clips = [Clip(id=str(n), path="ab"[n % 2], label=0, split="train", segment=segment) for n in range(9)]
    clips += [Clip(id=f"w{n}", path="a", label=0, split="train") for n in range(2)]
    assert rows_by_video(range(11), clips, most=3) == [[0, 2, 4], [1, 3, 5], [6, 8], [7], [9], [10]]


def test_a_path_names_its_segments_in_order() -> None:
    segments = [Segment(unit="frames", start=n, end=n + 5) for n in range(3)]
    clips = [clip_of(Path("a.mp4"), segment) for segment in segments] + [clip_of(Path("b.mp4"), None)]
    assert select(clips, ["b.mp4", "a.mp4"], source="s") == [3, 0, 1, 2]
    assert select(clips, ["a.mp4#1-6"], source="s") == [1]


def test_whole_numbers_and_decimals_are_one_segment() -> None:
    lists = [
        ClipList(clips=[clip_of(Path("a.mp4"), segment)], classes=("a",), source="s").content_id
        for segment in (Segment(unit="frames", start=3, end=9), Segment(unit="frames", start=3.0, end=9.0))
    ]
    assert lists[0] == lists[1]


def test_frames_by_time_are_those_of_a_plain_decode(films: Path) -> None:
    """The times that a choice is told are those that a decode from the start shows."""
    from evl_cache.video import ByTime, Shown

    told: list[np.ndarray] = []

    def choose(shown: Shown) -> np.ndarray:
        told.append(shown.seconds)
        return np.arange(shown.count)[None]

    for film in FILMS:
        decode_clip(films / film.name, ByTime(choose))
        within_s = 2e-5 if film.tick is None else 1.01 * film.tick  # halves are rounded as the muxer likes
        expected = np.asarray(film.seconds, np.float64)
        assert np.allclose(told[-1], expected, rtol=0, atol=float(within_s)), film.name
