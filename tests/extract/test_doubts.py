"""Caches whose frames an older rule chose: doubtful clips are told and made again, the rest stays to the byte."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch

from evl_cache.clips import ClipList
from evl_cache.errors import ClipError, UsageError
from evl_cache.extract import outages
from evl_cache.extract.doubts import check_doubts
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.older_rule import job_to_redo, spec_there, told_of_rule
from evl_cache.extract.repair import repair
from evl_cache.extract.sources import check_sources
from evl_cache.spec import FRAME_RULE
from evl_cache.store import FeatureCache, mark_path, valid_marks, verify_cache
from evl_cache.store.writing.publication import BlockPublication
from evl_cache.video.pool import DecodePool
from evl_cache_cli.main import main
from tests.support.older_caches import doubting, extract_by_first_rule, first_rule_spec
from tests.support.store_helpers import (
    BROKEN,
    differences,
    extract_small,
    load_clips,
    make_clips,
    one_thread,
    small_job,
    small_spec,
    small_tower,
    tree,
)

WRONG = "04.mp4"  # in the second block of three clips, beside 03 and the broken 05
REASON = "its second picture comes before its first"
Asked = list[tuple[str, str]]


@pytest.fixture(scope="module")
def made(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("old") / "cache"
    extract_by_first_rule(load_clips(motions), path, wrong=[WRONG])
    return path


@pytest.fixture(scope="module")
def right(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the same clips that is made today."""
    path = tmp_path_factory.mktemp("new") / "cache"
    extract_small(load_clips(motions), path)
    return path


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


@pytest.fixture
def videos(motions: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(motions, tmp_path / "videos"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The files that were examined, and by which decoder their frames were served."""
    found: Asked = []
    monkeypatch.setattr(DecodePool, "doubt", doubting({WRONG: REASON}, found))
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = DecodePool.frames

    def frames(self: DecodePool, path: Path, choose: object) -> Iterator[object]:
        names.append(Path(path).name)
        yield from real(self, path, choose)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodePool, "frames", frames)
    return names


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
        torch.set_num_threads(1)
        capsys.readouterr()
        status: object = None
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
            os.environ.clear()
            os.environ.update(environment)
        assert isinstance(status, int)
        return (status, *capsys.readouterr())

    return call


def old(clips: ClipList, cache: Path, **options: object):  # type: ignore[no-untyped-def]
    return extract_small(clips, cache, spec=first_rule_spec(clips), **options)


def rows(cache: Path, row: int) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in FeatureCache(cache).read_row(row).items()}


def rules(cache: Path) -> dict[str, int | None]:
    spec = FeatureCache(cache).spec
    return {clip.id: clip.frame_rule for mark in valid_marks(cache, spec) for clip in mark.clips}


def data(cache: Path) -> dict[str, bytes]:
    """Shards by name, which flat chunk keys give them: the older caches have folders."""
    files = {
        re.sub("/c/.*", lambda found: "/c" + found[0][2:].replace("/", "."), n): c
        for n, c in tree(cache).items()
    }
    return {name: content for name, content in files.items() if "/c." in name}


def test_doubtful_clips_alone_are_made_again_and_every_other_byte_of_features_stays(
    motions: Path, made: Path, right: Path, cache: Path, asked: Asked, decoded: list[str]
) -> None:
    assert rows(made, 4) != rows(right, 4)
    result = old(load_clips(motions), cache, retry_doubtful=True)
    assert (result.clips_doubtful, result.clips_cleared, result.clips_done_here) == (1, 6, 1)
    assert (result.not_redone, result.frames_untold, result.sources_in_doubt) == ((), None, None)
    assert set(decoded) == {WRONG}
    assert rows(cache, 4) == rows(right, 4)
    for row in (0, 1, 2, 3, 6, 7):
        assert rows(cache, row) == rows(made, row)
    changed = differences(data(cache), data(made))
    assert changed and all(name.split("/c.")[1].startswith("1.") for name in changed)
    assert {name.partition(".")[2] for name, _ in asked} == {"mp4"} and len(asked) == 7
    assert {decoder for _, decoder in asked} == {f"PyAV {av.__version__}"}


def test_afterwards_all_clips_are_of_the_rule_of_today_and_the_cache_is_still_itself(
    motions: Path, made: Path, cache: Path, asked: Asked
) -> None:
    result = old(load_clips(motions), cache, retry_doubtful=True)
    found, before = FeatureCache(cache), FeatureCache(made)
    assert found.spec == before.spec and found.spec.feature_id == before.spec.feature_id
    assert dict(found.by_older_rule) == {} and found.frame_rule == FRAME_RULE
    assert rules(cache) == {
        f"{i:02d}.mp4": None if f"{i:02d}.mp4" == BROKEN else FRAME_RULE for i in range(8)
    }
    verified = verify_cache(cache)
    assert verified.problems == () and verified.cache_digest == result.cache_digest == found.fingerprint
    asked.clear()
    again = tree(cache)
    second = old(load_clips(motions), cache, retry_doubtful=True)
    assert (second.was_done, asked, second.clips_doubtful, second.clips_cleared) == (True, [], 0, 0)
    assert differences(tree(cache), again) == []


def test_a_doubtful_clip_that_cannot_be_made_again_keeps_its_features_and_stays_doubtful(
    motions: Path, made: Path, cache: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DecodePool, path: Path, choose: object) -> Iterator[object]:
        raise ClipError(f"{path}: damaged")
        yield

    monkeypatch.setattr(DecodePool, "frames", fail)
    result = old(load_clips(motions), cache, retry_doubtful=True)
    assert len(result.not_redone) == 1 and WRONG in result.not_redone[0]
    assert rows(cache, 4) == rows(made, 4)
    assert list(FeatureCache(cache).by_older_rule) == [4]
    assert verify_cache(cache).problems == ()


def test_videos_that_are_gone_or_others_are_said_and_their_clips_stay_in_question(
    motions: Path, made: Path, cache: Path, videos: Path, asked: Asked
) -> None:
    (videos / "00.mp4").unlink()
    shutil.copy(videos / "02.mp4", videos / "01.mp4")
    result = old(load_clips(motions), cache, retry_doubtful=True, folder=videos)
    assert result.sources_in_doubt is not None and "00.mp4" in result.sources_in_doubt
    assert result.sources_changed is not None and "01.mp4" in result.sources_changed
    assert sorted(FeatureCache(cache).by_older_rule) == [0, 1]
    assert not {"00.mp4", "01.mp4"} & {name for name, _ in asked}
    assert rows(cache, 0) == rows(made, 0) and rows(cache, 1) == rows(made, 1)


def test_a_file_that_cannot_be_looked_into_is_doubtful(
    motions: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, decoder: str) -> str | None:
        raise ClipError(f"{path}: the decoder crashed")

    clips, spec = load_clips(motions).clips, FeatureCache(cache).spec
    sources = check_sources(cache, spec, clips, motions, prove=True)
    found = check_doubts(cache, spec, clips, motions, sources=sources, doubt=crash, threads=1)
    assert len(found.doubtful) == 7 and not found.cleared
    assert "the decoder crashed" in found.doubtful[0]


@pytest.mark.parametrize("what", ["retry_failed", "check_sources"])
def test_what_is_made_again_in_an_older_cache_is_of_the_rule_of_today(
    cache: Path, videos: Path, motions: Path, asked: Asked, what: str
) -> None:
    shutil.copy(videos / "02.mp4", videos / (BROKEN if what == "retry_failed" else "00.mp4"))
    clips = load_clips(motions)
    old(clips, cache, folder=videos, **{what: True})
    again = BROKEN if what == "retry_failed" else "00.mp4"
    assert {name for name, rule in rules(cache).items() if rule == FRAME_RULE} == {again}
    assert asked == []
    assert verify_cache(cache).problems == ()


def test_repair_of_an_older_cache_chooses_frames_by_the_rule_of_today_and_says_so(
    motions: Path, right: Path, cache: Path
) -> None:
    shard = cache / "tokens" / "c" / "1" / "0" / "0" / "0" / "0"
    shard.unlink()
    with one_thread():
        found = repair(
            cache,
            tower=lambda description: small_tower(motions),
            root=motions,
            options=ExtractOptions(decode_workers=1),
        )
    assert found.blocks_redone == (1,) and f"frame_rule: {FRAME_RULE}, not 1" in found.environment_differs
    assert [name for name, rule in rules(cache).items() if rule == FRAME_RULE] == ["03.mp4", "04.mp4"]
    assert rows(cache, 4) == rows(right, 4)
    assert FeatureCache(cache).spec.frame_rule == 1 and verify_cache(cache).problems == ()


def test_an_unfinished_older_cache_is_finished_by_the_rule_of_today(
    motions: Path, right: Path, cache: Path, asked: Asked
) -> None:
    spec = FeatureCache(cache).spec
    (cache / "manifest.json").unlink()
    mark_path(cache, 1).unlink()
    for path in cache.rglob("c/1/**/*"):
        if path.is_file():
            path.unlink()
    old(load_clips(motions), cache)
    assert FeatureCache(cache).spec == spec
    assert [name for name, rule in rules(cache).items() if rule == FRAME_RULE] == ["03.mp4", "04.mp4", BROKEN]
    assert rows(cache, 4) == rows(right, 4)


def test_reuse_copies_from_an_older_cache_what_is_not_doubtful(
    motions: Path, made: Path, right: Path, tmp_path: Path, asked: Asked, decoded: list[str]
) -> None:
    new = tmp_path / "new"
    result = extract_small(load_clips(motions), new, reuse=made)
    assert set(decoded) == {WRONG, BROKEN}
    assert set(rules(new).values()) == {None}
    assert FeatureCache(new).spec == FeatureCache(right).spec
    assert differences(data(new), data(right)) == []
    assert result.cache_digest == FeatureCache(right).fingerprint


def test_reuse_asks_nothing_of_clips_whose_marks_say_that_they_are_right(
    motions: Path, cache: Path, right: Path, tmp_path: Path, asked: Asked, decoded: list[str]
) -> None:
    old(load_clips(motions), cache, retry_doubtful=True)
    asked.clear()
    decoded.clear()
    extract_small(load_clips(motions), tmp_path / "new", reuse=cache)
    assert asked == [] and set(decoded) == {BROKEN}
    assert differences(data(tmp_path / "new"), data(right)) == []


def test_a_doubtful_clip_is_not_made_again_of_another_caches_doubtful_rows(
    motions: Path, made: Path, right: Path, cache: Path, asked: Asked
) -> None:
    old(load_clips(motions), cache, retry_doubtful=True, reuse=made)
    assert rows(cache, 4) == rows(right, 4)


def test_a_rule_that_only_later_versions_know_is_read_and_nothing_is_extracted(
    motions: Path, right: Path, tmp_path: Path
) -> None:
    clips = load_clips(motions)
    later = small_spec(clips, small_tower(motions), frame_rule=FRAME_RULE + 1)
    with pytest.raises(UsageError, match=f"rule {FRAME_RULE + 1}.*install a newer version"):
        extract_small(clips, tmp_path / "later", spec=later)
    assert not (tmp_path / "later").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evl_cache.spec.FRAME_RULE", FRAME_RULE + 1)
        extract_small(clips, tmp_path / "later", spec=later)
    assert rows(tmp_path / "later", 0) == rows(right, 0)
    assert dict(FeatureCache(tmp_path / "later").by_older_rule) == {}
    with pytest.raises(UsageError, match="install a newer version"):
        extract_small(clips, tmp_path / "new", reuse=tmp_path / "later")


@pytest.mark.parametrize("step", ["_begin_redo", "_end_redo", "_written_mark"])
def test_a_kill_while_marks_are_written_costs_nothing_and_the_next_run_ends_it(
    motions: Path, right: Path, cache: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real, calls = getattr(BlockPublication, step), []

    def killed(self: BlockPublication) -> object:
        calls.append(self)
        if len(calls) == 3:  # after the block that was redone, and the marks of the first
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPublication, step, killed)
        with pytest.raises(KeyboardInterrupt):
            old(load_clips(motions), cache, retry_doubtful=True)
    assert all(FeatureCache(cache).is_valid == FeatureCache(right).is_valid)
    old(load_clips(motions), cache, retry_doubtful=True)
    assert verify_cache(cache).problems == () and FeatureCache(cache).has_manifest
    assert dict(FeatureCache(cache).by_older_rule) == {}
    assert differences(data(cache), data(right)) == []


def test_in_a_cache_of_the_rule_of_today_nothing_is_doubtful_and_nothing_is_read(
    motions: Path, right: Path, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(right, tmp_path / "cache")
    monkeypatch.setattr("evl_cache.extract.sources.file_digest", lambda path: 1 / 0)
    result = extract_small(load_clips(motions), tmp_path / "cache", retry_doubtful=True)
    assert result.was_done and asked == []
    assert differences(tree(tmp_path / "cache"), tree(right)) == []


# Which cache a command means


def test_a_cache_that_is_named_goes_on_by_its_own_rule_and_others_stay_others(
    motions: Path, made: Path, right: Path
) -> None:
    clips = load_clips(motions)
    spec = small_spec(clips, small_tower(motions))
    assert spec_there(spec, made) == FeatureCache(made).spec
    assert spec_there(spec, right) == spec == spec_there(spec, motions)
    other = replace(spec, layers=(3,))
    assert spec_there(other, made) == other


def test_redoing_means_the_older_cache_where_there_is_no_newer_one(
    motions: Path, made: Path, right: Path, tmp_path: Path
) -> None:
    clips = load_clips(motions)
    job = small_job(clips, tmp_path / small_spec(clips, small_tower(motions)).name)
    older = tmp_path / first_rule_spec(clips).name
    shutil.copytree(made, older)
    assert job_to_redo(job, ExtractOptions()) == job
    for what in ("retry_failed", "check_sources", "retry_doubtful"):
        meant = job_to_redo(job, ExtractOptions(**{what: True}))
        assert (meant.cache_path, meant.spec.frame_rule) == (older, 1)
    shutil.copytree(right, job.cache_path)
    assert job_to_redo(job, ExtractOptions(retry_failed=True)) == job
    assert job_to_redo(job, ExtractOptions(retry_doubtful=True)).cache_path == older


def test_a_user_is_told_of_an_older_cache_and_how_its_rows_are_taken(
    motions: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path))
    clips = load_clips(motions)
    job = small_job(clips, tmp_path / "elsewhere" / "new")
    assert told_of_rule(job, ExtractOptions()) is None
    older = tmp_path / first_rule_spec(clips).name
    shutil.copytree(made, older)
    told = told_of_rule(job, ExtractOptions())
    assert told is not None and f"--split train --reuse {older} copies" in told
    assert told_of_rule(job, ExtractOptions(reuse=older)) is None
    here = told_of_rule(small_job(clips, older, spec=first_rule_spec(clips)), ExtractOptions())
    assert here is not None and "--retry-doubtful" in here


# The commands


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a list of two videos, and a cache of them whose frames the first rule chose."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVL_CACHE_ROOT", raising=False)
    make_clips(tmp_path / "videos", 2, broken=False)
    (tmp_path / "clips.txt").write_text("00.mp4 0\n01.mp4 1\n")
    return tmp_path


EXTRACT = "extract --dataset list --list clips.txt --root videos --model videos/tower.json --pretrained none".split()
EXTRACT += "--layers 2-3 --frames 4 --stride 2 --decode-workers 1".split()


def test_the_commands_from_an_older_cache_to_one_without_doubt(
    listed: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodePool, "doubt", doubting({"01.mp4": REASON}, []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evl_cache.spec.FRAME_RULE", 1)
        patch.setattr("evl_cache.extract.stage.CacheSpec", _of_first_rule)
        assert run(*EXTRACT)[0] == 0
    (older,) = (listed / "caches").iterdir()
    assert FeatureCache(older).spec.frame_rule == 1

    status, out, err = run("info", older)
    assert status == 0 and f"verify --sources {older}" in out and "2 can be told only by the videos" in out
    status, out, err = run("verify", older, "--sources")
    assert status == 1 and f"doubtful: 01.mp4: {REASON}" in err and "1 clips doubtful" in out
    found = json.loads(run("verify", older, "--check-sources", "--json")[1])
    assert (found["doubtful"], found["sources"]) == ([f"01.mp4: {REASON}"], [])
    (listed / "videos" / "00.mp4").rename(listed / "away.mp4")
    status, out, err = run("verify", older, "--sources")
    assert status == 1 and "source: 00.mp4" in err and "is not there" in err
    (listed / "away.mp4").rename(listed / "videos" / "00.mp4")

    status, out, err = run(*EXTRACT, "--cache", older)
    assert status == 0 and "nothing to do" in out
    assert "it stays that cache" in err and "--retry-doubtful makes again" in err
    status, out, err = run(*EXTRACT, "--retry-doubtful")
    assert status == 0 and "1 of 2 examined were doubtful" in out and str(older.name) in out
    assert [path for path in (listed / "caches").iterdir() if path.is_dir()] == [older]
    assert f"all clips by rule {FRAME_RULE}" in run("info", older)[1]
    status, out, err = run("verify", older, "--sources")
    assert (status, err) == (0, "")

    status, out, err = run(*EXTRACT)
    assert status == 0 and f"--reuse caches/{older.name} copies" in err
    assert len(list((listed / "caches").iterdir())) == 2
    status, out, err = run(*EXTRACT, "--cache", older)
    assert status == 0 and "nothing to do" in out and "rule" not in err
    listed_rules = {cache["frame_rule"] for cache in json.loads(run("ls", "caches", "--json")[1])["caches"]}
    assert listed_rules == {1, FRAME_RULE}


def _of_first_rule(**fields: object):  # type: ignore[no-untyped-def]
    from evl_cache.spec import CacheSpec

    return CacheSpec(**fields, frame_rule=1)  # type: ignore[arg-type]


def test_an_outage_while_videos_are_examined_changes_nothing(
    motions: Path, made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: DecodePool, path: Path, decoder: str) -> str | None:
        raise outages.Outage(f"{path}: cannot be read", remedy="bring the disk back")

    monkeypatch.setattr(DecodePool, "doubt", away)
    with pytest.raises(outages.Outage):
        old(load_clips(motions), cache, retry_doubtful=True)
    assert differences(data(cache), data(made)) == [] and FeatureCache(cache).spec == FeatureCache(made).spec
    assert differences(tree(cache), tree(made)) == []
