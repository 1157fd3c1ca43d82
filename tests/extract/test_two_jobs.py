"""Several jobs on one cache, at once or one after another: shared, paused, changed, retried, grown."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evl_cache.canonical_json import canonical_json, digest
from evl_cache.errors import CacheError, UsageError
from evl_cache.spec import FORMAT_VERSION
from evl_cache.store import (
    BlockLock,
    FeatureCache,
    LockWatcher,
    create_cache,
    restore_description,
    verify_cache,
)
from evl_cache.store.writing.publication import BlockPublication
from tests.support.clocks import Clock
from tests.support.extraction_server import Server, reached
from tests.support.store_helpers import (
    BROKEN,
    differences,
    extract_small,
    is_stopped,
    load_clips,
    make_clips,
    small_spec,
    small_tower,
    tree,
    wait_until,
)

EXPIRY_S = 0.6


@pytest.fixture(scope="module")
def alone(store_server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """Files of a single job's cache, and its forward passes."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    ended = store_server.run(cache)
    return tree(cache), ended.report["passes"]


def test_two_jobs_share_the_blocks_of_one_cache(
    store_server: Server, alone: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    files, passes = alone
    gates = [tmp_path / name for name in ("go on", "go on, too")]
    pids = [store_server.start(tmp_path / "cache", gates={1: str(gate)}) for gate in gates]
    wait_until(lambda: all(reached(gate).exists() for gate in gates), what="each has a block in hand")
    for gate in gates:
        gate.touch()
    reports = [store_server.wait(pid).report for pid in pids]
    assert sum(report["here"] for report in reports) == 8  # each clip once
    assert sum(report["passes"] for report in reports) == passes
    assert min(report["here"] for report in reports) > 0
    assert {report["digest"] for report in reports} == {json.loads(files["manifest.json"])["digest"]}
    assert differences(tree(tmp_path / "cache"), files) == []


def test_jobs_that_start_at_once_with_other_options_do_not_mix(store_server: Server, tmp_path: Path) -> None:
    storages = [{}, {"tokens": "fp16"}, {"codec": "raw"}]
    pids = [store_server.start(tmp_path / "cache", spec=spec) for spec in storages]
    reports = [store_server.wait(pid).report for pid in pids]
    assert sorted(report.get("error", "") for report in reports) == ["", "UsageError", "UsageError"]
    assert verify_cache(tmp_path / "cache").problems == ()
    assert verify_cache(tmp_path / "cache").strays == ()


@pytest.mark.parametrize("same_bytes", [True, False], ids=["same bytes", "other bytes"])
@pytest.mark.parametrize("where", ["tokens/c.0", "class_tokens/c.0", "000000.json"])
def test_a_writer_paused_past_its_lock_wakes_to_a_block_that_another_did(
    store_server: Server, alone: tuple[dict[str, bytes], int], tmp_path: Path, where: str, same_bytes: bool
) -> None:
    cache, options = tmp_path / "cache", {"lock_expiry_s": EXPIRY_S}
    job: dict[str, Any] = {"options": options}
    if not same_bytes:  # as from a machine whose floating point differs
        make_clips(tmp_path / "videos", seed=1)
        job["folder"] = str(tmp_path / "videos")
    paused = store_server.start(cache, options=options, stop_before_link=where)
    wait_until(lambda: is_stopped(paused), what=f"the first writer stops before {where}")
    other = store_server.run(cache, **job).report
    assert other["here"] == 8
    before = tree(cache)
    os.kill(paused, signal.SIGCONT)
    woken = store_server.wait(paused)
    assert woken.code == 0
    assert woken.report["here"] == 0
    assert woken.report["digest"] == other["digest"]
    assert differences(tree(cache), before) == []
    assert verify_cache(cache).problems == ()
    if same_bytes:
        assert differences(before, alone[0]) == []


@pytest.mark.parametrize("same_bytes", [True, False], ids=["same bytes", "other bytes"])
def test_a_writer_that_wakes_after_the_look_at_its_lock_looks_again_before_it_changes_anything(
    store_server: Server, alone: tuple[dict[str, bytes], int], tmp_path: Path, same_bytes: bool
) -> None:
    """Paused between the look at its lock and its first change. Later pauses: tests/support/simulation.py."""
    cache, options = tmp_path / "cache", {"lock_expiry_s": EXPIRY_S}
    make_clips(tmp_path / "videos", seed=1)
    job: dict[str, Any] = {"options": options} | ({} if same_bytes else {"folder": str(tmp_path / "videos")})
    paused = store_server.start(cache, options=options, stop_before_publishing=True)
    wait_until(lambda: is_stopped(paused), what="the first writer stops in its commit")
    assert store_server.run(cache, **job).report["here"] == 8
    os.kill(paused, signal.SIGCONT)
    assert store_server.wait(paused).report["here"] == 0
    found = verify_cache(cache)
    assert (found.problems, found.strays, found.blocks_done) == ((), (), 3)
    assert not any((cache / "locks").iterdir())
    if same_bytes:
        assert differences(tree(cache), alone[0]) == []


@pytest.mark.parametrize("clips_in_between", [1, 4])
def test_a_writer_paused_among_its_clips_wakes_to_a_valid_cache(
    store_server: Server, alone: tuple[dict[str, bytes], int], tmp_path: Path, clips_in_between: int
) -> None:
    cache, options, gate = tmp_path / "cache", {"lock_expiry_s": EXPIRY_S}, tmp_path / "go on"
    paused = store_server.start(cache, options=options, gates={clips_in_between: str(gate)})
    wait_until(reached(gate).exists, what="so many clips are done")
    os.kill(paused, signal.SIGSTOP)
    wait_until(lambda: is_stopped(paused), what="the first writer stops")
    assert store_server.run(cache, options=options).code == 0
    gate.touch()
    os.kill(paused, signal.SIGCONT)
    assert store_server.wait(paused).code == 0
    assert differences(tree(cache), alone[0]) == []


def test_the_lock_of_a_job_that_died_here_is_free_at_once(store_server: Server, tmp_path: Path) -> None:
    dead = store_server.start(tmp_path / "cache", stop_before_link="000000.json")
    wait_until(lambda: is_stopped(dead), what="the first writer stops")
    os.kill(dead, signal.SIGKILL)
    store_server.wait(dead)
    assert list((tmp_path / "cache" / "locks").glob("0*.lock"))
    started = time.monotonic()
    assert store_server.run(tmp_path / "cache", options={"lock_expiry_s": 3600}).report["here"] == 8
    assert time.monotonic() - started < 600


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def test_a_lock_that_beats_is_never_taken(locks: Path) -> None:
    clock = Clock()
    holder = LockWatcher(locks, expiry_s=0.4, beat_s=0.01)
    watcher = LockWatcher(locks, expiry_s=0.4, runtime=clock)
    with _as_of_another_machine(holder, 7) as lock:
        for _ in range(20):
            seen = lock.path.read_bytes()
            assert watcher.take(7) is None
            wait_until(lambda: lock.path.read_bytes() != seen, what="its holder counts on")  # noqa: B023
            clock.now += 0.3
        assert lock.is_held()
    taken = watcher.take(7)
    assert taken is not None
    taken.release()
    assert list(locks.iterdir()) == []


def test_a_lock_that_stands_still_is_taken_after_its_expiry_and_its_holder_notices(locks: Path) -> None:
    clock = Clock()
    holder = LockWatcher(locks, expiry_s=0.4, beat_s=3600)
    watcher = LockWatcher(locks, expiry_s=0.4, runtime=clock)
    lost = _as_of_another_machine(holder, 7)
    while (taken := watcher.take(7)) is None:
        clock.sleep(0.02)
    assert 0.4 <= clock.now < 0.5
    assert taken.is_held()
    assert not lost.is_held()
    lost.release()
    assert taken.is_held()  # a late release leaves another's lock alone
    taken.release()


def test_a_watcher_that_was_paused_itself_does_not_take_at_its_first_look(locks: Path) -> None:
    clock = Clock()
    holder = LockWatcher(locks, expiry_s=0.2, beat_s=3600)
    watcher = LockWatcher(locks, expiry_s=0.2, runtime=clock)
    lock = _as_of_another_machine(holder, 7)
    assert watcher.take(7) is None
    clock.sleep(0.5)  # both were paused for so long, by a batch system say
    assert watcher.take(7) is None
    assert lock.is_held()
    lock.release()


def _as_of_another_machine(holder: LockWatcher, block: int) -> BlockLock:
    """A lock whose holder cannot be seen to live or die from here."""
    lock = holder.take(block)
    assert lock is not None
    content = lock.path.read_bytes()
    counter, text = content[:20], json.loads(content[20:])
    lock.path.write_bytes(counter + json.dumps(text | {"machine": "elsewhere"}).encode())
    return lock


def test_leftovers_stay_while_another_job_is_at_work(motions: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract_small(load_clips(motions), cache)
    staged = cache / "done" / f".tmp-host-1-{'0' * 16}"
    staged.write_text("a mark that another job is about to publish")
    with _as_of_another_machine(LockWatcher(cache / "locks"), 1):
        extract_small(load_clips(motions), cache)
        assert staged.exists()
    extract_small(load_clips(motions), cache)
    assert not staged.exists()
    assert list((cache / "locks").iterdir()) == []


def test_a_block_that_keeps_being_lost_is_an_error_in_the_end(
    motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        BlockPublication, "_written_lies_there", lambda self, staged: False
    )  # a disk that forgets
    with pytest.raises(CacheError, match="block 0"):
        extract_small(load_clips(motions), tmp_path / "cache")


def test_changed_options_name_the_fields_and_change_nothing(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    extract_small(clips, cache)
    before = tree(cache)
    other = small_spec(clips, small_tower(motions), tokens="fp16", layers=(1, 2))
    with pytest.raises(UsageError, match=r"layers: \[1, 2\], not \[2, 3\]; tokens: \"fp16\", not \"int8\""):
        extract_small(clips, cache, spec=other)
    with pytest.raises(UsageError, match="num_clips: 6, not 8"):
        extract_small(replace(clips, clips=clips.clips[:6]), cache)
    assert differences(tree(cache), before) == []


def test_another_format_version_says_what_to_do(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    extract_small(clips, cache)
    group = json.loads((cache / "zarr.json").read_bytes())
    own = group["attributes"]["evl_cache"]
    own["format_version"] = FORMAT_VERSION + 1
    own["digest"] = digest({name: value for name, value in own.items() if name != "digest"})
    recovery = {"group": group, "clips": []}
    (cache / "zarr.json").write_bytes(canonical_json(group))
    (cache / "recovery.json").write_bytes(canonical_json({**recovery, "digest": digest(recovery)}))
    before = tree(cache)
    for use in (FeatureCache, verify_cache, restore_description, lambda path: extract_small(clips, path)):
        with pytest.raises(CacheError, match=r"format 3; this evl-cache reads formats 1 to 2: install"):
            use(cache)
    assert differences(tree(cache), before) == []


def test_unknown_fields_of_the_description_survive(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    spec = small_spec(clips, small_tower(motions), extra={"colour_space": {"matrix": "bt709"}})
    create_cache(cache, spec, clips.clips, origin={}, created_with={})
    extract_small(clips, cache, spec=FeatureCache(cache).spec)
    (cache / "zarr.json").unlink()
    assert restore_description(cache) == ["zarr.json"]
    assert FeatureCache(cache).spec.extra == {"colour_space": {"matrix": "bt709"}}
    assert verify_cache(cache).problems == ()


@pytest.fixture
def videos(motions: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(motions, tmp_path / "videos"))


def test_retry_failed_redoes_the_block_of_a_clip_whose_file_was_mended(videos: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(videos), tmp_path / "cache"
    assert [clip for clip, _ in extract_small(clips, cache).failures] == [BROKEN]
    before = tree(cache)
    make_clips(videos, broken=False)
    again = extract_small(clips, cache)  # a failure is a result: not tried again unless asked for
    assert (again.clips_done_here, [clip for clip, _ in again.failures]) == (0, [BROKEN])
    assert differences(tree(cache), before) == []
    retried = extract_small(clips, cache, retry_failed=True)
    assert (retried.clips_done_here, retried.failures) == (1, ())
    extract_small(clips, tmp_path / "fresh")
    assert differences(tree(cache), tree(tmp_path / "fresh")) == []


def test_retry_failed_without_failures_does_nothing(videos: Path, tmp_path: Path) -> None:
    make_clips(videos, broken=False)
    clips = load_clips(videos)
    extract_small(clips, tmp_path / "cache")
    assert extract_small(clips, tmp_path / "cache", retry_failed=True).clips_done_here == 0


def test_a_retry_in_vain_changes_nothing(store_server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store_server.run(cache)
    before, times = tree(cache), {path: path.stat().st_mtime_ns for path in cache.rglob("0*.json")}
    assert store_server.run(cache, options={"retry_failed": True}).report["here"] == 0
    assert differences(tree(cache), before) == []
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_retry_killed_at_any_change_loses_no_clip_and_goes_on(
    store_server: Server, videos: Path, tmp_path: Path
) -> None:
    """Good clips stay good at every instant, for readers too; the same command ends as if it had never been killed."""
    store_server.run(tmp_path / "before")
    values = _good(tmp_path / "before")
    make_clips(videos, broken=False)
    job: dict[str, Any] = {"folder": str(videos), "options": {"retry_failed": True}}
    whole = store_server.run(_copy(tmp_path / "before", tmp_path / "whole"), **job)
    for kill_at in range(1, whole.report["changes"] + 1, 13):
        cache = _copy(tmp_path / "before", tmp_path / f"killed {kill_at}")
        ended = store_server.run(cache, kill_at=kill_at, kill_after=bool(kill_at % 2), **job)
        assert ended.code == -signal.SIGKILL, kill_at
        found = _good(cache)
        assert values.keys() <= found.keys(), kill_at
        assert all(torch.equal(values[clip], found[clip]) for clip in values), kill_at
        assert store_server.run(cache, **job).code == 0
        assert differences(tree(cache), tree(tmp_path / "whole")) == [], kill_at
        shutil.rmtree(cache)


def _copy(cache: Path, target: Path) -> Path:
    return Path(shutil.copytree(cache, target))


def _good(cache: Path) -> dict[str, torch.Tensor]:
    """What readers get of every valid clip: the tokens."""
    opened = FeatureCache(cache)
    rows = opened.is_valid.nonzero()[0].tolist()
    return {opened.clips[row].id: torch.stack(opened.read([row])[0]) for row in rows}


def test_reuse_grows_a_list_without_computing_and_with_the_same_bytes(
    store_server: Server, alone: tuple[dict[str, bytes], int], tmp_path: Path
) -> None:
    files, passes = alone
    store_server.run(tmp_path / "short", clips=6)
    grown = store_server.run(tmp_path / "grown", options={"reuse": str(tmp_path / "short")})
    assert 0 < grown.report["passes"] < passes  # those of the block with the new clips
    assert differences(tree(tmp_path / "grown"), files) == []
    copied = store_server.run(tmp_path / "copied", options={"reuse": str(tmp_path / "grown")})
    assert copied.report["passes"] == 0
    assert differences(tree(tmp_path / "copied"), files) == []


def test_reuse_across_codecs_copies_values(motions: Path, tmp_path: Path) -> None:
    clips = load_clips(motions)
    extract_small(clips, tmp_path / "raw", spec=small_spec(clips, small_tower(motions), codec="raw"))
    extract_small(clips, tmp_path / "reused", reuse=tmp_path / "raw")
    extract_small(clips, tmp_path / "fresh")
    assert differences(tree(tmp_path / "reused"), tree(tmp_path / "fresh")) == []


def test_reuse_of_other_features_is_refused_with_both_sides(motions: Path, tmp_path: Path) -> None:
    clips = load_clips(motions)
    extract_small(clips, tmp_path / "short")
    spec = small_spec(clips, small_tower(motions), tokens="fp16")
    with pytest.raises(UsageError, match='tokens: "fp16", not "int8"'):
        extract_small(clips, tmp_path / "grown", spec=spec, reuse=tmp_path / "short")
