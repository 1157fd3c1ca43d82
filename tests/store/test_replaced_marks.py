"""A mark of a complete cache that is intact, and not the one that its index and manifest were made of."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged
from evl_cache.extract.reuse import ReusableRows
from evl_cache.store import LOCKS_NAME, FeatureCache, LockWatcher, finish_cache, valid_mark
from evl_cache.store.copying.part import copy_part
from evl_cache.store.format.layout import mark_path
from evl_cache.store.writing.mark_records import replace_records
from tests.support.feature_caches import write_cache


def with_sources(path: Path, decoder: str) -> FeatureCache:
    """Give the clips of a cache a video's digest each, and a decoder."""
    spec = FeatureCache(path).spec
    for block in range(spec.num_blocks):
        mark, lock = valid_mark(path, spec, block), LockWatcher(path / LOCKS_NAME).take(block)
        assert mark is not None and lock is not None
        rows = zip(spec.clips_of_block(block), mark.clips, strict=True)
        clips = [replace(clip, source_sha256=f"{row:064x}", decoder=decoder) for row, clip in rows]
        assert replace_records(path, spec, mark, clips, lock=lock)
        lock.release()
    finish_cache(path, spec)
    return FeatureCache(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of three blocks, the second of which has a mark of the same clips, whose records are others."""
    write_cache(tmp_path / "cache")
    with_sources(tmp_path / "cache", "one")
    other = write_cache(tmp_path / "other", seed=5)
    with_sources(other.path, "another")
    shutil.copy(mark_path(other.path, 1), mark_path(tmp_path / "cache", 1))
    return tmp_path / "cache"


def test_layers_of_a_block_are_not_copied_with_the_records_of_another_mark(
    cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(CacheDamaged, match=r"000001\.json: is not the mark that the cache was opened by"):
        copy_part(cache, tmp_path / "part", layers=(3, 4), codec=None)


def test_features_are_not_reused_with_the_records_of_another_mark(cache: Path) -> None:
    rows = ReusableRows(cache, FeatureCache(cache).spec, doubt=lambda path, decoder: None)
    taken = [
        rows.fetch(Clip(id=f"c{row}", path="x.mp4", label=0, split="train"), f"{row:064x}", Path("x.mp4"))
        for row in range(13)
    ]
    assert taken == [True] * 5 + [False] * 5 + [True] * 3
