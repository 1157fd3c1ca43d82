"""Caches of segments: killed and resumed, redone, checked, grown, reused; each film decoded once for a block."""

import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.canonical_json import canonical_json
from evl_cache.clips import ClipList, Segment
from evl_cache.datasets import check_missing
from evl_cache.errors import UsageError
from evl_cache.extract import block, outages, sources
from evl_cache.extract.failure_limit import DEFAULT_IN_A_ROW, FailureLimit
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import repair
from evl_cache.extract.sources import check_sources
from evl_cache.live.clips import LiveClips
from evl_cache.live.loader import OnlineLoader
from evl_cache.processes import Processes
from evl_cache.show import view
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store import FeatureCache, Reads, array_layouts, valid_marks, verify_cache
from evl_cache.towers import Backbone
from evl_cache.video import decode_clip
from evl_cache.video.pool import DecodePool
from tests.support.extraction_server import Server
from tests.support.grown_caches import grow
from tests.support.numbered_films import numbers_shown
from tests.support.segmented_films import LongFilm, clip_of, films_of, plain_views, segmented
from tests.support.store_helpers import (
    differences,
    extract_small,
    one_thread,
    small_spec,
    small_tower,
    tree,
)

VIEWS = ViewSpec(frames=4, stride=2)
BLOCK_CLIPS = 8


def spec_of(clips: ClipList, **changes: object) -> CacheSpec:
    tower = small_tower(Path(clips.source))
    return small_spec(clips, tower, **{"views": VIEWS, "block_clips": BLOCK_CLIPS, **changes})


def check_frames(cache: Path, clips: ClipList, films: list[LongFilm]) -> None:
    """Every clip's frames are those of its segment, and the film shows their numbers there."""
    by_name = {film.name: film for film in films}
    shown = {film.name: _numbers(Path(clips.source) / film.name) for film in films}
    records = [record for mark in valid_marks(cache, FeatureCache(cache).spec) for record in mark.clips]
    assert [record.id for record in records] == [clip.id for clip in clips.clips]
    for clip, record in zip(clips.clips[:-1], records, strict=False):
        film = by_name[clip.path]
        assert clip.segment is not None and record.error is None, record
        frames = film.frames_of(clip.segment)
        assert [list(view) for view in record.indices] == plain_views(frames, VIEWS), clip.id
        drawn = [shown[clip.path][i] for i in record.indices[0]]
        assert drawn == [film.film.first + i for i in record.indices[0]], clip.id
    assert "holds no frame" in records[-1].error


def _numbers(path: Path) -> list[int]:
    return numbers_shown(decode_clip(path, lambda count: np.arange(count)[None]).frames)


class Watched:
    """Counts decodes and hashes by file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decodes, self.hashes = Counter[str](), Counter[str]()
        frames, sha256_of = DecodePool.frames, outages.sha256_of

        def counted(pool, path, choose):
            self.decodes[Path(path).name] += 1
            return frames(pool, path, choose)

        def hashed(path):
            self.hashes[Path(path).name] += 1
            return sha256_of(path)

        monkeypatch.setattr(DecodePool, "frames", counted)
        monkeypatch.setattr(outages, "sha256_of", hashed)
        monkeypatch.setattr(outages, "_SETTLED_NS", -(1 << 62))


@pytest.fixture(scope="module")
def films() -> list[LongFilm]:
    return films_of(4, 90)


@pytest.fixture(scope="module")
def clips(films: list[LongFilm], tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    return segmented(tmp_path_factory.mktemp("segments"), films, 40, seed=3)


@pytest.fixture(scope="module")
def whole(clips: ClipList, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("whole") / "cache"
    extract_small(clips, cache, spec=spec_of(clips))
    return cache


def blocks_of_films(clips: ClipList) -> Counter[str]:
    """In how many blocks each film has clips."""
    pairs = {(row // BLOCK_CLIPS, clip.path) for row, clip in enumerate(clips.clips)}
    return Counter(path for _, path in pairs)


def test_each_film_is_decoded_once_for_a_block_and_hashed_once(
    clips: ClipList, films: list[LongFilm], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    extract_small(clips, tmp_path / "cache", spec=spec_of(clips))
    assert watched.decodes == blocks_of_films(clips)
    assert watched.hashes == Counter(film.name for film in films)
    assert differences(tree(tmp_path / "cache"), tree(whole)) == []
    check_frames(whole, clips, films)
    assert verify_cache(whole).problems == ()
    ((failed, reason),) = FeatureCache(whole).failures
    assert failed == clips.clips[-1].id and "10000-10005 (seconds)" in reason and "the last at" in reason


def test_one_by_one_gives_the_same_bytes(
    clips: ClipList, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "rows_by_video", lambda rows, clips, most: [[row] for row in rows])
    extract_small(clips, tmp_path / "cache", spec=spec_of(clips))
    assert differences(tree(tmp_path / "cache"), tree(whole)) == []


def test_killed_anywhere_and_run_again_it_has_the_same_bytes(clips: ClipList, tmp_path: Path) -> None:
    killed_and_resumed(clips, tmp_path, times=4, block_clips=BLOCK_CLIPS)


def killed_and_resumed(clips: ClipList, folder: Path, *, times: int, block_clips: int) -> None:
    server = Server(Path(clips.source))
    job = {"spec": {"block_clips": block_clips}}
    try:
        undisturbed = server.run(folder / "undisturbed", **job)
        assert undisturbed.code == 0 and len(undisturbed.report["failures"]) == 1, undisturbed
        for number in range(times):
            cache = folder / str(number)
            at = 1 + int((number + 0.5) / times * undisturbed.report["changes"])
            assert server.run(cache, kill_at=at, **job).code == -signal.SIGKILL
            assert server.run(cache, **job).code == 0
            assert differences(tree(cache), tree(folder / "undisturbed")) == []
    finally:
        server.close()


def test_sources_are_hashed_once_a_file_and_told_once(
    clips: ClipList, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(clips.source, videos)
    replaced, gone = clips.clips[0].path, clips.clips[-1].path
    content = bytearray((videos / replaced).read_bytes())
    content[-1] ^= 1
    (videos / replaced).write_bytes(content)
    (videos / gone).unlink()
    hashed: list[str] = []
    digest = sources._sha256
    monkeypatch.setattr(sources, "_sha256", lambda path: hashed.append(path) or digest(path))
    found = check_sources(whole, spec_of(clips), clips.clips, videos, prove=True)
    assert sorted(Path(path).name for path in hashed) == sorted({clip.path for clip in clips.clips} - {gone})
    assert {clips.clips[row].path for row in found.changed} == {replaced} and len(found.changed) == 10
    assert found.told_of_changed is not None and found.told_of_changed.startswith("1 videos")
    assert found.told_of_unproved is not None and found.told_of_unproved.startswith("1 videos")


def test_segments_that_failed_are_tried_again_and_others_stay(
    clips: ClipList, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, videos = tmp_path / "cache", tmp_path / "videos"
    shutil.copytree(clips.source, videos)
    away = clips.clips[0].path
    (videos / away).rename(tmp_path / away)
    extract_small(clips, cache, spec=spec_of(clips), folder=videos, most_failures=FailureLimit(count=40))
    assert len(FeatureCache(cache).failures) == 11
    (tmp_path / away).rename(videos / away)
    watched = Watched(monkeypatch)
    extract_small(clips, cache, spec=spec_of(clips), folder=videos, retry_failed=True)
    assert watched.decodes[away] == 2 and set(watched.decodes) == {away, clips.clips[-1].path}
    mine, theirs = FeatureCache(cache), FeatureCache(whole)
    assert mine.failures == theirs.failures
    rows = np.flatnonzero(theirs.is_valid)
    for a, b in zip(mine.read(rows), theirs.read(rows), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_features_of_another_segment_under_the_same_id_are_not_reused(
    clips: ClipList, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *others = clips.clips[:6]
    assert first.path == second.path and second.segment is not None
    other = replace(first, segment=Segment(unit="frames", start=3, end=33))
    listed = replace(clips, clips=(other, second, *others))
    watched = Watched(monkeypatch)
    extract_small(listed, tmp_path / "cache", spec=spec_of(listed), reuse=whole)
    assert sum(watched.decodes.values()) == 1  # the other segment alone
    extract_small(listed, tmp_path / "fresh", spec=spec_of(listed))
    for a, b in zip(
        FeatureCache(tmp_path / "cache").read(range(6)),
        FeatureCache(tmp_path / "fresh").read(range(6)),
        strict=True,
    ):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_a_cache_grows_by_segments_and_not_into_others(clips: ClipList, whole: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    few = replace(clips, clips=clips.clips[:12])
    changes = {"views": VIEWS, "block_clips": BLOCK_CLIPS}
    grow(few, cache, **changes)
    grow(clips, cache, **changes)
    mine, theirs = FeatureCache(cache), FeatureCache(whole)
    assert list(mine.clips) == list(theirs.clips)
    rows = np.flatnonzero(theirs.is_valid)
    for a, b in zip(mine.read(rows), theirs.read(rows), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    first = clips.clips[0]
    assert first.segment is not None
    moved = replace(first, segment=replace(first.segment, end=first.segment.end + 1))
    with pytest.raises(UsageError, match=r"is segment .* in the list, not segment"):
        grow(replace(clips, clips=(moved, *clips.clips[1:])), cache, **changes)


def test_a_clip_table_keeps_segments(clips: ClipList, whole: Path) -> None:
    stored = FeatureCache(whole).clips
    assert tuple(clip.segment for clip in stored) == tuple(clip.segment for clip in clips.clips)
    assert (whole / "clips.jsonl").read_bytes() == b"".join(
        canonical_json(clip.to_json()) for clip in clips.clips
    )
    assert stored[3] == clips.clips[3] and stored.labels.tolist() == [clip.label for clip in clips.clips]


def test_a_missing_film_is_one_file_of_many_clips(clips: ClipList, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(clips.source, videos)
    (videos / clips.clips[0].path).unlink()
    with pytest.raises(
        UsageError, match=r"10 of 40 clips \(25 %\) are missing under .*: 1 file: film00\.mp4; expected"
    ):
        check_missing(clips, videos, allow_percent=0)
    assert len(check_missing(clips, videos, allow_percent=25)) == 10


def test_a_picture_names_the_segment_and_shows_its_frames(
    clips: ClipList, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = []
    monkeypatch.setattr(view, "draw_view", lambda picture, path: pictures.append(picture))
    monkeypatch.chdir(clips.source)  # the cache names no folder of videos
    clip, cache = clips.clips[1], FeatureCache(whole)
    with DecodePool(1) as pool:
        view.draw_cached(cache, clip.id, tmp_path / "a.png", run=None, decode=pool.frames)
        with pytest.raises(UsageError, match="names 10 clips, segments of one video"):
            view.draw_cached(cache, clip.path, tmp_path / "a.png", run=None, decode=pool.frames)
    (picture,) = pictures
    assert picture.title == f"{clip.id} ({clip.segment.unit} {clip.segment})"
    (record,) = [
        record for mark in valid_marks(whole, cache.spec) for record in mark.clips if record.id == clip.id
    ]
    assert picture.frame_names == [f"frame {index}" for index in record.indices[0]]


def test_live_features_of_segments_are_those_of_the_cache(clips: ClipList, whole: Path) -> None:
    spec = FeatureCache(whole).spec
    source = LiveClips(path=Path(clips.source), spec=spec, clips=clips.clips)
    rows = np.asarray([2, 14, 27, 39])  # the last is beyond its film
    backbone = Backbone(small_tower(Path(clips.source)).visual.float(), spec.stored_layers, with_maps=True)
    with (
        DecodePool(1) as pool,
        OnlineLoader(
            source,
            rows,
            backbone=backbone,
            device=torch.device("cpu"),
            batch=4,
            shuffle_seed=None,
            decode=pool.frames,
            workers=1,
            processes=Processes(),
        ) as loader,
    ):
        (batch,) = loader.epoch()
    assert batch.samples.tolist() == [2, 14, 27] and "holds no frame" in loader.failures[39]
    tokens, _ = FeatureCache(whole).read_stored(rows[:3], Reads(layers=spec.layers)).dequantized()
    for live, stored in zip(batch.features.tokens, tokens, strict=True):
        assert (live - stored).abs().max() < 0.05 * stored.abs().max()


def test_a_bad_video_of_many_segments_is_one_failure_in_a_row(clips: ClipList, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(clips.source, videos)
    bad = videos / clips.clips[0].path
    bad.write_bytes(bad.read_bytes()[:200])
    many = tuple(
        clip_of(bad, Segment(unit="frames", start=n, end=n + 9)) for n in range(DEFAULT_IN_A_ROW + 3)
    )
    listed = replace(clips, clips=(*many, clips.clips[20]))
    extract_small(listed, tmp_path / "cache", spec=spec_of(listed), folder=videos)
    assert len(FeatureCache(tmp_path / "cache").failures) == len(many)


def test_a_damaged_shard_is_repaired_to_the_same_bytes(clips: ClipList, whole: Path, tmp_path: Path) -> None:
    cache, spec = tmp_path / "cache", FeatureCache(whole).spec
    shutil.copytree(whole, cache)
    shard = array_layouts(spec)["tokens"].shard(cache, 1)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    tower = small_tower(Path(clips.source))
    with one_thread():
        options = ExtractOptions(batch=4, decode_workers=1)
        result = repair(cache, tower=lambda description: tower, root=Path(clips.source), options=options)
    assert result.blocks_redone == (1,) and verify_cache(cache).problems == ()
    assert differences(tree(cache), tree(whole)) == []


@pytest.mark.soak
def test_a_thousand_segments_of_twenty_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films = films_of(20, 700)
    clips = segmented(tmp_path / "films", films, 1000, seed=11)
    assert len(clips.clips) == 1000
    with monkeypatch.context() as patched:
        watched = Watched(patched)
        extract_small(clips, tmp_path / "cache", spec=spec_of(clips, block_clips=64))
        pairs = {(row // 64, clip.path) for row, clip in enumerate(clips.clips)}
        assert watched.decodes == Counter(path for _, path in pairs)
        assert watched.hashes == Counter(film.name for film in films)
    check_frames(tmp_path / "cache", clips, films)
    killed_and_resumed(clips, tmp_path, times=6, block_clips=64)
