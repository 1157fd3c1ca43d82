"""A copy put over another cache: what is good there is not lost, neither by failures in the source nor by a bad transfer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evl_cache.caches.share import pull, push
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store import FeatureCache, verify_cache
from evl_cache.store.format.layout import MANIFEST_NAME, redo_path
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
        CacheError, match=r"block 0 stays as it is: 1 of its clips would lose.*\(c0: broken\)"
    ):
        copy(worse, whole)
    assert differences(tree(whole), before) == []


def test_failures_are_replaced_by_features(whole: Path, worse: Path) -> None:
    assert pull(str(whole), str(worse)).blocks_moved == 2
    assert differences(tree(worse), tree(whole)) == []


def test_a_block_that_arrives_damaged_leaves_the_one_that_is_there(whole: Path, worse: Path) -> None:
    path = whole / "maps/c/1/0/0/0/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = FeatureCache(worse).is_valid.copy()
    with pytest.raises(CacheDamaged, match="what arrived is not what its mark promises"):
        pull(str(whole), str(worse), threads=1)
    assert (FeatureCache(worse).is_valid >= before).all()
    assert [problem for problem in verify_cache(worse).problems if problem.block is not None] == []


def test_a_copy_that_was_killed_in_the_midst_of_replacing_a_block_ends_it(whole: Path, worse: Path) -> None:
    redo_path(worse, 1).touch()
    name = "class_tokens/c/1/0/0/0"
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
