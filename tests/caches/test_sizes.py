"""The size of a cache: what is counted, from where it is known, and that no command looks at each file of a large one."""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from evl_cache.caches.card import cache_card
from evl_cache.caches.info import describe
from evl_cache.caches.listing import list_caches
from evl_cache.errors import CacheError
from evl_cache.store import FeatureCache, cache_size, check_free_space, manifest_at, read_description
from evl_cache.store.format.size import CacheSize
from evl_cache.store.writing.segments import SEGMENT_BLOCKS, write_segment_of
from tests.support.feature_caches import cache_spec, clip_list, write_cache
from tests.support.servers import faulty_server

KNOWN = ("index.bin", "manifest.json")  # of a complete cache; without the first the second tells, else a look


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "cache"
    write_cache(path, failed=[2])
    return path


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def size_of(cache: Path) -> CacheSize:
    return cache_size(cache, read_description(cache).spec)


def test_what_the_manifest_names_is_counted_by_index_by_manifest_and_by_a_look(cache: Path) -> None:
    manifest = manifest_at(cache, read_description(cache).spec)
    assert manifest is not None
    (cache / "README.md").write_text("a card is not counted, nor are locks")
    (cache / "tokens" / "stray").write_bytes(bytes(1000))
    expected = CacheSize(
        nbytes=sum(size for size, _ in manifest.files.values()),
        files=len(manifest.files),
        shard_nbytes=sum(size for name, (size, _) in manifest.files.items() if "/c" in name),
        blocks_done=3,
        cache_digest=manifest.digest,
    )
    assert size_of(cache) == expected
    (cache / "index.bin").unlink()
    assert size_of(cache) == expected
    (cache / "manifest.json").unlink()
    assert size_of(cache) == expected._replace(cache_digest=None)


def test_of_an_unfinished_cache_only_what_is_marked_is_counted(cache: Path) -> None:
    for name in KNOWN:
        (cache / name).unlink()
    whole = size_of(cache)
    (cache / "done" / "000001.json").unlink()
    left = size_of(cache)
    assert left.blocks_done == 2 and left.files == whole.files - 7
    assert left.shard_nbytes < whole.shard_nbytes and left.nbytes < whole.nbytes


def test_a_file_that_is_gone_or_a_link_is_no_error(cache: Path, tmp_path: Path) -> None:
    for name in KNOWN:
        (cache / name).unlink()
    before = size_of(cache)
    shard = next(path for path in (cache / "maps").rglob("*") if path.is_file() and path.name != "zarr.json")
    nbytes = shard.stat().st_size
    shard.unlink()
    assert size_of(cache).shard_nbytes == before.shard_nbytes - nbytes
    (tmp_path / "big").write_bytes(bytes(10**6))
    shard.symlink_to(tmp_path / "big")
    assert size_of(cache).shard_nbytes < before.shard_nbytes + 10**5
    assert size_of(tmp_path / "cache").files == before.files


def test_segments_tell_of_an_unfinished_cache_as_a_look_does(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    spec = write_cache(path, labels=[0] * (SEGMENT_BLOCKS + 2), block_clips=1, layers=(2,), maps="none").spec
    for name in KNOWN:
        (path / name).unlink()
    looked = cache_size(path, spec)
    assert write_segment_of(path, spec, 0)
    assert cache_size(path, spec) == looked


def test_info_of_a_directory_and_behind_a_url_tells_the_same_size(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    here = describe(finished)
    with faulty_server(finished.parent) as server:
        there = describe(f"{server.url}/{finished.name}")
        (listed,) = list_caches([f"{server.url}/{finished.name}"])
    assert (there["bytes"], there["files"]) == (here["bytes"], here["files"])
    assert listed.nbytes == next(list_caches([str(finished)])).nbytes


def test_the_card_has_the_size_that_info_tells(finished: Path) -> None:
    cache, told = FeatureCache(finished), describe(finished)
    assert f"{told['bytes']:,} bytes in {told['files']} files" in cache_card(cache)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files were opened, looked at and listed."""
    counted: Counter[str] = Counter()

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return real(*args, **kwargs)

        return call

    for name in ("open", "stat", "lstat", "scandir", "listdir"):
        monkeypatch.setattr(os, name, watched(name))
    return counted


@pytest.mark.parametrize("look", ["ls", "info", "size"])
def test_a_complete_cache_is_told_of_with_as_many_calls_whatever_its_blocks(
    look: str, tmp_path: Path, calls: Counter[str]
) -> None:
    looks: dict[str, Callable[[Path], object]] = {
        "ls": lambda path: list(list_caches([str(path)])),
        "info": describe,
        "size": size_of,
    }
    found = []
    for clips in (4, 40):
        path = tmp_path / str(clips)
        write_cache(path, labels=[0] * clips, block_clips=2, layers=(2,), maps="none")
        looks[look](path)  # what is found once a process
        calls.clear()
        looks[look](path)
        found.append(dict(calls))
    assert found[0] == found[1]
    assert found[0]["open"] < 20


def test_an_unfinished_cache_is_told_of_with_a_listing_a_directory(
    tmp_path: Path, calls: Counter[str]
) -> None:
    found = []
    for clips in (4, 40):
        path = tmp_path / str(clips)
        spec = write_cache(path, labels=[0] * clips, block_clips=2, layers=(2,), maps="none").spec
        for name in KNOWN:
            (path / name).unlink()
        cache_size(path, spec)
        calls.clear()
        cache_size(path, spec)
        found.append((calls["open"], calls["listdir"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("clips", [10, 13])
def test_room_is_needed_for_the_samples_of_blocks_that_are_not_done(
    clips: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = cache_spec(clip_list([0] * clips, classes=3))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (1, 1, 0))
    (tmp_path / "done").mkdir()
    for count in range(spec.num_blocks):
        for done in combinations(range(spec.num_blocks), count):
            for block in done:
                (tmp_path / "done" / f"{block:06d}.json").touch()
            left = sum(len(spec.clips_of_block(b)) for b in range(spec.num_blocks) if b not in done)
            with pytest.raises(CacheError, match=f": {left * spec.views.per_clip} samples need"):
                check_free_space(tmp_path, spec)
            for block in done:
                (tmp_path / "done" / f"{block:06d}.json").unlink()


def test_room_for_any_number_of_blocks_is_counted_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(cache_spec(), num_clips=10**15)  # a loop over its blocks would not end
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (1, 1, 0))
    with pytest.raises(CacheError, match=f"{10**15} samples need"):
        check_free_space(tmp_path, spec)
