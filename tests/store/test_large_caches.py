"""The generator of large caches for benchmarks: what it writes is what the store would have written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.support.large_caches import make_unfinished, write_large_cache
from benchmarks.support.large_sizes import SIZES, Size
from evl_cache.store import FeatureCache, mark_path, verify_cache
from evl_cache.store.format.marks import mark_content, read_mark
from evl_cache.store.writing.completion import write_manifest
from evl_cache.train import TrainOptions, train

THREE_BLOCKS = Size(clips=16, views=10, changes={})  # of 6, 6 and 4 clips


def is_whole(path: Path) -> bool:
    found = verify_cache(path)
    return not found.problems and not found.strays and found.blocks_done == found.blocks


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "cache"
    write_large_cache(path, THREE_BLOCKS)
    return path


def test_a_generated_cache_passes_verify_and_reads_the_same_features_in_all_blocks(cache_path: Path) -> None:
    assert is_whole(cache_path)
    cache = FeatureCache(cache_path)
    assert (cache_path / "index.bin").is_file()
    assert cache.is_complete and cache.has_manifest and cache.spec.num_blocks == 3
    assert [clip for clip, _ in cache.failures] == [cache.clips[7].id]
    assert not list(cache_path.parent.glob(".*"))
    (first, *_), _ = cache.read([0, 9])
    assert not torch.equal(first[0], first[1])


def test_blocks_of_one_kind_have_the_same_features(tmp_path: Path) -> None:
    write_large_cache(tmp_path / "cache", Size(clips=4, views=32, changes={"maps": "none"}))
    cache = FeatureCache(tmp_path / "cache")
    assert cache.spec.num_blocks == 2
    write_large_cache(tmp_path / "four", Size(clips=8, views=32, changes={"maps": "none"}))
    cache = FeatureCache(tmp_path / "four")
    assert cache.spec.num_blocks == 4
    tokens, _ = cache.read([5, 128 + 5, 192 + 5])
    for layer in tokens:
        assert torch.equal(layer[0], layer[1]) and torch.equal(layer[0], layer[2])


def test_marks_are_those_that_the_store_writes_byte_for_byte(cache_path: Path) -> None:
    spec = FeatureCache(cache_path).spec
    for block in range(3):
        mark = read_mark(cache_path, block, spec)
        assert mark is not None
        assert mark_content(mark, spec) == mark_path(cache_path, block).read_bytes()


def test_manifest_and_index_are_those_that_the_store_writes_byte_for_byte(cache_path: Path) -> None:
    files = [cache_path / name for name in ("manifest.json", "index.bin")]
    generated = [path.read_bytes() for path in files]
    spec = FeatureCache(cache_path).spec
    make_unfinished(cache_path, spec, None)
    write_manifest(cache_path, spec)
    assert [path.read_bytes() for path in files] == generated


@pytest.mark.parametrize("name", ["k400x1", "10m"])
def test_sizes_of_other_storage_pass_verify(tmp_path: Path, name: str) -> None:
    write_large_cache(tmp_path / "cache", replace(SIZES[name], clips=70))
    assert is_whole(tmp_path / "cache")


def test_a_head_trains_a_step_on_a_generated_cache(cache_path: Path, tmp_path: Path) -> None:
    write_large_cache(tmp_path / "val", replace(THREE_BLOCKS, split="val"))
    losses: list[float] = []
    train(
        FeatureCache(cache_path),
        FeatureCache(tmp_path / "val"),
        options=TrainOptions(head="decoder1", steps=1, batch=8),
        out=tmp_path / "run",
        on_step=lambda done, total, loss: losses.append(loss),
    )
    assert len(losses) == 1
