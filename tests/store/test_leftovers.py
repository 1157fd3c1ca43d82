"""Staged files in a directory that all blocks share: those of the dead go, those of writers at work stay."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from evl_cache.spec import CHUNK_KEYS, CacheSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockNotDone,
    BlockWriter,
    ClipRecord,
    LockWatcher,
    array_layouts,
    copy_to_directory,
    create_cache,
    finish_cache,
    valid_mark,
    verify_cache,
)
from evl_cache.store.disk.lock_files import machine_id
from evl_cache.store.disk.publish import is_staging_name, stage_file, staged_block
from tests.support.feature_caches import cache_spec, clip_list

BLOCKS = 6
CLIPS = clip_list([0] * BLOCKS, classes=1)
DEAD = '00000000000000000000{"host":"h","machine":"%s","pid":999999999,"start":"1","token":"t"}'


def made_spec(chunk_keys: str) -> CacheSpec:
    return cache_spec(CLIPS, block_clips=1, chunk_keys=chunk_keys)


@pytest.fixture(params=CHUNK_KEYS)
def spec(request: pytest.FixtureRequest) -> CacheSpec:
    return made_spec(request.param)


@pytest.fixture
def cache(tmp_path: Path, spec: CacheSpec) -> Path:
    return laid_down(tmp_path / "cache", spec)


def laid_down(cache: Path, spec: CacheSpec) -> Path:
    create_cache(cache, spec, CLIPS.clips, origin={}, created_with={})
    return cache


@contextmanager
def at_work(cache: Path, spec: CacheSpec, block: int) -> Iterator[BlockWriter]:
    """A writer that has the block's lock, and has staged its files."""
    lock = LockWatcher(cache / LOCKS_NAME).take(block)
    assert lock is not None
    with lock, ThreadPoolExecutor(1) as encoders:
        writer = BlockWriter(cache, spec, block, lock=lock, encoders=encoders)
        try:
            yield writer
        finally:
            writer.close()


def commit(writer: BlockWriter) -> None:
    writer.append(None)
    writer.commit([ClipRecord(id=f"c{writer.block}", error="broken")], {})


def died(cache: Path, spec: CacheSpec, block: int) -> None:
    """What a job leaves that died while it wrote a block: its lock, and a staged file in each array."""
    (cache / LOCKS_NAME / f"{block:06d}.lock").write_text(DEAD % machine_id())
    for layout in array_layouts(spec).values():
        directory = layout.shard(cache, block).parent
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f".tmp-b{block:06d}.h-999999999-{'0' * 16}").write_bytes(b"half a shard")


def staged_in(cache: Path) -> Counter[int | None]:
    """How many staged files there are of each block."""
    return Counter(staged_block(path.name) for path in cache.rglob(".tmp-*"))


def test_a_staged_file_tells_its_block_and_no_other_name_does(tmp_path: Path) -> None:
    for block in (0, 42, 999_999, 1_000_000, 123_456_789):
        with stage_file(tmp_path, block=block) as staged:
            assert is_staging_name(staged.path.name) and staged_block(staged.path.name) == block
    with stage_file(tmp_path) as staged:
        assert is_staging_name(staged.path.name) and staged_block(staged.path.name) is None
    of_older_versions = f".tmp-b000042-1-{'0' * 16}"  # of a host that is called so
    assert is_staging_name(of_older_versions) and staged_block(of_older_versions) is None
    for name in (
        f".tmp-b42.h-1-{'0' * 16}",
        f".tmp-b000042.-1-{'0' * 16}",
        f"tmp-b000042.h-1-{'0' * 16}",
        "c.42.0.0",
    ):
        assert not is_staging_name(name) and staged_block(name) is None


def test_whoever_takes_a_dead_jobs_block_removes_its_files_and_no_living_ones(
    cache: Path, spec: CacheSpec
) -> None:
    arrays = len(array_layouts(spec))
    died(cache, spec, 2)
    died(cache, spec, 3)
    with at_work(cache, spec, 0) as first, at_work(cache, spec, 1) as second:
        with at_work(cache, spec, 2) as third:
            assert staged_in(cache) == dict.fromkeys((0, 1, 2, 3), arrays)
            commit(third)
        commit(second)
        commit(first)
    assert staged_in(cache) == {3: arrays}
    assert all(valid_mark(cache, spec, block) for block in (0, 1, 2))


def test_a_sweep_beside_writers_removes_only_what_the_dead_left(cache: Path, spec: CacheSpec) -> None:
    arrays = len(array_layouts(spec))
    with at_work(cache, spec, 0) as first, at_work(cache, spec, 1) as second:
        died(cache, spec, 2)
        died(cache, spec, 3)
        with pytest.raises(BlockNotDone):
            finish_cache(cache, spec)
        assert staged_in(cache) == {0: arrays, 1: arrays}
        commit(second)
        commit(first)
    assert verify_cache(cache).problems == ()


def test_what_a_job_stages_that_begins_during_the_sweep_stays(
    cache: Path, spec: CacheSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, sweep = len(array_layouts(spec)), LockWatcher.sweep
    old = cache / "tokens" / f".tmp-h-1-{'0' * 16}"
    old.write_bytes(b"left long ago")
    works = list[BlockWriter]()
    with ThreadPoolExecutor(1) as encoders:

        def begun_after(self: LockWatcher, **options: object) -> bool:
            is_idle = sweep(self, **options)  # type: ignore[arg-type]
            lock = LockWatcher(cache / LOCKS_NAME).take(4)
            assert lock is not None
            works.append(BlockWriter(cache, spec, 4, lock=lock, encoders=encoders))
            return is_idle

        monkeypatch.setattr(LockWatcher, "sweep", begun_after)
        with pytest.raises(BlockNotDone):
            finish_cache(cache, spec)
        assert not old.exists() and staged_in(cache) == {4: arrays}
        commit(works[0])
        works[0].close()
    assert valid_mark(cache, spec, 4) is not None


def test_a_directory_of_all_blocks_is_listed_once_and_not_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = made_spec("flat")
    cache, found, real = laid_down(tmp_path / "cache", spec), Counter[str](), os.listdir

    def listdir(path: str | Path) -> list[str]:
        found[Path(path).name] += 1
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    for block in range(3):
        with at_work(cache, spec, block) as writer:
            commit(writer)
    names = set(array_layouts(spec))
    assert names.isdisjoint(found)
    for block in range(3, BLOCKS):
        died(cache, spec, block)
    with pytest.raises(BlockNotDone):
        finish_cache(cache, spec)
    assert staged_in(cache) == {}
    assert {name: found[name] for name in names} == dict.fromkeys(
        names, 2
    )  # before the locks, and at the first dead


def test_a_copy_goes_on_where_one_died_beside_another_that_lives(
    tmp_path: Path, spec: CacheSpec, cache: Path
) -> None:
    for block in range(BLOCKS):
        with at_work(cache, spec, block) as writer:
            commit(writer)
    finish_cache(cache, spec)
    target = laid_down(tmp_path / "target", spec)
    died(target, spec, 2)
    died(target, spec, 5)
    seen = list[Counter[int | None]]()
    copy_to_directory(str(cache), target, threads=1, on_block=lambda moved: seen.append(staged_in(target)))
    assert [sorted(found, key=str) for found in seen] == [[2, 5], [2, 5], [5], [5], [5], []]
    assert verify_cache(target).problems == ()
