"""An open reader among processes, threads and changing files: right values or an error, never others, never a crash."""

import contextlib
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.store import FeatureCache, Reads
from evl_cache.store.format.layout import mark_path
from evl_cache.store.reading import sample_reader
from tests.support.feature_caches import TOWER, write_cache

LARGE = replace(
    TOWER, image_size=64, width=512, heads=8
)  # chunks of 100 kB are copied and checked one by one
Values = list[list[torch.Tensor]]


@pytest.fixture(params=["default", "raw"])
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_reader, "_NFS_WAIT_S", 0.0)


def write(path: Path, codec: str, *, seed: int = 0, large: bool = False) -> FeatureCache:
    """Seven clips in blocks of three; clip 4 failed."""
    tower = LARGE if large else TOWER
    labels = [i % 3 for i in range(7)]
    return write_cache(path, codec=codec, tower=tower, labels=labels, block_clips=3, failed=[4], seed=seed)


@pytest.fixture(scope="module")
def two_large_caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Of each codec, two that differ in every value; tests copy them."""
    root = tmp_path_factory.mktemp("caches")
    return {
        codec: [write(root / f"{codec}-{seed}", codec, large=True, seed=seed).path for seed in (0, 1)]
        for codec in ("default", "raw")
    }


def values(cache: FeatureCache, sample: int, layers: tuple[int, ...] | None = None) -> list[torch.Tensor]:
    tokens, maps = cache.read([sample], layers)
    assert maps is not None
    return [*tokens, *maps]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("large", [False, True], ids=["small chunks", "large chunks"])
def test_raw_and_compressed_mapped_and_read_by_calls_give_the_same(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [write(tmp_path / codec, codec, large=large) for codec in ("default", "raw")]
    monkeypatch.setattr(sample_reader, "is_local", lambda path: False)
    caches += [FeatureCache(cache.path) for cache in caches]
    caches += [FeatureCache(cache.path, trust=True) for cache in caches[:2]]
    assert [cache.is_local for cache in caches[:4]] == [True, True, False, False]
    for layers in (None, (3,), (2, 4), (2, 3)):
        for sample in (0, 5, 6):
            first, *others = (values(cache, sample, layers) for cache in caches)
            assert all(same(other, first) for other in others)
    for cache in caches:
        with pytest.raises(CacheError, match="failed"):
            cache.read([4])


def test_buffers_of_other_layers_are_refused(tmp_path: Path, codec: str) -> None:
    cache = write(tmp_path / "cache", codec)
    with pytest.raises(UsageError, match="buffer of tokens"):
        cache.read_into(cache.buffers(slots=1, reads=Reads(layers=(2, 3))), [(0, 0)], (2, 3, 4))


def test_a_spawned_process_reads_with_a_cache_that_was_read_here(tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", "raw")  # mapped here already
    here = cache.read([0, 5])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(cache.read, [0, 5]).result()
    for found, expected in zip(there, here, strict=True):
        assert found is not None and expected is not None
        assert same(found, expected)


@pytest.mark.parametrize("is_mapped", [True, False], ids=["mapped", "read by calls"])
@pytest.mark.parametrize("change", ["replaced", "overwritten", "cut short", "grown", "emptied", "removed"])
def test_a_file_that_changes_under_an_open_reader(
    tmp_path: Path,
    codec: str,
    change: str,
    is_mapped: bool,
    two_large_caches: dict[str, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample_reader, "is_local", lambda path: is_mapped)
    for name, written in zip(("cache", "other"), two_large_caches[codec], strict=True):
        shutil.copytree(written, tmp_path / name)
    expected = values(FeatureCache(tmp_path / "cache"), 0)
    opened, unopened = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache")
    assert same(values(opened, 0), expected)
    name = "tokens/c.0.0.0.0.0"
    _change(tmp_path / "cache" / name, tmp_path / "other" / name, change)

    # What was opened before may still be there: then it is what it was. So may bytes before the place of a cut.
    still_there = change in ("replaced", "removed") or (not is_mapped and change in ("cut short", "grown"))
    for cache, may_serve in ((opened, still_there), (unopened, False)):
        if may_serve:
            with contextlib.suppress(CacheDamaged):
                assert same(values(cache, 0), expected)
        else:
            with pytest.raises(CacheDamaged, match="repair"):
                values(cache, 0)
        assert len(values(cache, 5)) == 6  # other blocks are served


def _change(path: Path, other: Path, change: str) -> None:
    size = path.stat().st_size
    if change == "replaced":
        os.replace(other, path)
    elif change == "overwritten":
        content = other.read_bytes()
        with path.open("r+b") as file:
            file.write(content[:size])
    elif change == "removed":
        path.unlink()
    else:
        os.truncate(path, {"cut short": size // 2, "grown": size + 4096, "emptied": 0}[change])


def test_a_block_that_appears_while_others_are_read(tmp_path: Path, codec: str) -> None:
    whole = write(tmp_path / "cache", codec)
    expected = {sample: values(whole, sample) for sample in (0, 3, 5, 6)}
    hidden = tmp_path / "mark"
    shutil.move(mark_path(tmp_path / "cache", 1), hidden)
    (
        tmp_path / "cache" / "manifest.json"
    ).unlink()  # as of a cache that grows: the index tells nothing without it
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(CacheError, match="not extracted yet"):
        cache.read([3])
    stop, wrong = threading.Event(), []

    def busy() -> None:
        while not stop.is_set():
            wrong.extend(s for s in (0, 6) if not same(values(cache, s), expected[s]))

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    shutil.move(hidden, mark_path(tmp_path / "cache", 1))
    cache.refresh()
    assert same(values(cache, 3), expected[3])
    assert same(values(cache, 5), expected[5])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert np.flatnonzero(~cache.is_valid).tolist() == [4]
    assert cache.is_complete
