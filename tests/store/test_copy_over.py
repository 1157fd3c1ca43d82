"""A copy put over another cache: what is good there is not lost, neither by failures in the source nor by a bad transfer."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evl_cache.caches.share import pull, push
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store import LOCKS_NAME, FeatureCache, LockWatcher, array_layouts, valid_mark, verify_cache
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.format.layout import MANIFEST_NAME, mark_path, redo_path
from evl_cache.store.writing import publication
from tests.support.feature_caches import write_cache
from tests.support.store_helpers import clear_mark, differences, tree


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "whole").path


@pytest.fixture
def worse(tmp_path: Path) -> Path:
    """The same cache, made where three clips failed."""
    return write_cache(tmp_path / "worse", failed=(0, 6, 7)).path


Copy = Callable[[Path, Path], object]


def _part(source: Path, target: Path) -> object:
    return pull(str(source), str(target), layers=(2, 3, 4))


@pytest.mark.parametrize(
    "copy",
    [lambda a, b: push(a, str(b)), lambda a, b: pull(str(a), str(b)), _part],
    ids=["push", "pull", "part"],
)
def test_features_are_not_replaced_by_failures(whole: Path, worse: Path, copy: Copy) -> None:
    before = tree(whole)
    with pytest.raises(
        CacheError, match=r"block [01] stays as it is: [12] of its clips would lose.*\(c[06]: broken"
    ):
        copy(worse, whole)
    assert differences(tree(whole), before) == []


def test_failures_are_replaced_by_features(whole: Path, worse: Path) -> None:
    assert pull(str(whole), str(worse)).blocks_moved == 2
    assert differences(tree(worse), tree(whole)) == []


def test_a_block_that_arrives_damaged_leaves_the_one_that_is_there(whole: Path, worse: Path) -> None:
    path = whole / "maps/c.1.0.0.0.0.0"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = FeatureCache(worse).is_valid.copy()
    with pytest.raises(CacheDamaged, match=r"arrives damaged, 4 times, .*; repair the cache"):
        pull(str(whole), str(worse), threads=1)
    assert (FeatureCache(worse).is_valid >= before).all()
    assert [problem for problem in verify_cache(worse).problems if problem.block is not None] == []


def test_a_copy_that_was_killed_in_the_midst_of_replacing_a_block_ends_it(whole: Path, worse: Path) -> None:
    redo_path(worse, 1).touch()
    name = "class_tokens/c.1.0.0.0"
    (worse / name).write_bytes((whole / name).read_bytes())
    (worse / MANIFEST_NAME).unlink()
    pull(str(whole), str(worse))
    assert differences(tree(worse), tree(whole)) == []
    redo_path(worse, 1).touch()  # killed later: only the note of it was left
    pull(str(whole), str(worse))
    assert differences(tree(worse), tree(whole)) == []


def test_an_unfinished_cache_leaves_a_complete_one_complete(whole: Path, worse: Path) -> None:
    better = write_cache(whole.parent / "better", seed=3).path
    clear_mark(better, FeatureCache(better).spec, 2)
    pull(str(better), str(whole))
    assert FeatureCache(whole).is_complete
    assert (whole / MANIFEST_NAME).exists()
    assert verify_cache(whole).problems == ()


def ways(cache: Path, block: int) -> set[Path]:
    """A cache's directory, and all on the way to the files of a block."""
    shards = [layout.shard(cache, block) for layout in array_layouts(FeatureCache(cache).spec).values()]
    return {parent for shard in shards for parent in shard.parents if parent.is_relative_to(cache)}


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[Path]]]:
    """Marks as they are written, each with the directories that were synced since the one before."""
    synced, found = list[Path](), list[tuple[Path, list[Path]]]()
    sync, write = os.fsync, publication.write_atomic

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def write_atomic(path: Path, content: bytes, **options: Any) -> bool:
        found.append((path, [path for path in synced if path.is_dir()]))
        synced.clear()
        return write(path, content, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(publication, "write_atomic", write_atomic)
    return found


@pytest.mark.parametrize("has_files", [False, True], ids=["directories", "names too"])
@pytest.mark.parametrize(
    "copy",
    [lambda a, b: push(a, str(b), threads=1), lambda a, b: pull(str(a), str(b), threads=1)],
    ids=["push", "pull"],
)
def test_what_a_dead_job_left_unsynced_is_synced_before_a_copy_puts_its_mark(
    whole: Path,
    tmp_path: Path,
    marked: list[tuple[Path, list[Path]]],
    copy: Callable[..., object],
    has_files: bool,
) -> None:
    """A job that extracts syncs no directory before its block is ready, and may be killed until then."""
    target = tmp_path / "target"
    pull(str(whole), str(target))
    (target / MANIFEST_NAME).unlink()
    spec = FeatureCache(whole).spec
    for block in range(spec.num_blocks):
        mark_path(target, block).unlink()
        for layout in array_layouts(spec).values():
            if not has_files:
                layout.shard(target, block).unlink()
            make_directories(layout.shard(target, block).parent, sync=False)
    marked.clear()
    copy(whole, target)
    assert [path for path, _ in marked] == [mark_path(target, block) for block in range(spec.num_blocks)]
    for block, (_, synced) in enumerate(marked):
        assert ways(target, block) - set(synced) == set()


def test_a_mark_in_place_of_another_comes_after_its_directories_are_synced_once_each(
    whole: Path, marked: list[tuple[Path, list[Path]]]
) -> None:
    spec = FeatureCache(whole).spec
    mark = valid_mark(whole, spec, 1)
    assert mark is not None
    (whole / MANIFEST_NAME).unlink()
    lock = LockWatcher(whole / LOCKS_NAME).take(1)
    assert lock is not None
    with lock:
        block = publication.BlockPublication(whole, spec, 1, lock=lock)
        block.publish(replace(mark, environment={"host": "another"}), {})
    ((path, synced),) = marked
    assert path == mark_path(whole, 1)
    assert sorted(directory for directory in synced if directory.name not in ("done", LOCKS_NAME)) == sorted(
        ways(whole, 1)
    )
