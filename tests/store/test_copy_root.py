"""Making room among local copies: only shard files of copies that are marked as such, whatever else lies there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.errors import CacheError
from evl_cache.store import FeatureCache, create_cache, verify_cache
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.reading import copy_root
from evl_cache.store.reading.copy_root import MARKER_NAME, CopyRoot
from tests.support.feature_caches import cache_spec, clip_list, write_cache
from tests.support.foreign_files import look, plant_in_cache, touched, write
from tests.support.servers import faulty_server

LIMIT = 50_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "a"
    write_cache(path, labels=[i % 3 for i in range(30)])
    return path


@pytest.fixture(scope="module")
def url(cache: Path) -> Iterator[str]:
    with faulty_server(cache.parent) as server:
        yield f"{server.url}/a"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk where copies go and may take very little, so that whatever counts as one is removed."""
    monkeypatch.setenv("EVL_CACHE_COPY_GB", str(LIMIT / 1e9))
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def read_all(url: str) -> FeatureCache:
    """Read more than the limit, so that room is made again and again, and what was removed is fetched again."""
    remote = FeatureCache(url)
    assert remote.copy is not None
    for sample in range(30):
        remote.read([sample])
    before = remote.copy.requests
    remote.read([0])
    assert remote.copy.requests > before, "nothing was removed"
    return remote


def test_caches_and_files_on_the_disk_of_the_copies_are_left_alone(
    cache: Path, url: str, home: Path, tmp_path: Path
) -> None:
    for place in ("caches/mine", "mine", "0" * 32, f"{'ab' * 16}.old", "c/0"):
        shutil.copytree(cache, home / place)
    for name in (
        "src/c/lib/thesis.c",
        "c/thesis.c",
        "tokens/c.0.0.0.0.0",
        "tokens/c/0/0/0/0/0",
        ".config/c/x",
        f"{'1f' * 16}/c/thesis.c",
    ):
        write(home / name)
    plant_in_cache(home, tmp_path / "outside")
    (home / ("2e" * 16)).symlink_to(cache)  # named like a copy
    before, outside, served = look(home), look(tmp_path / "outside"), look(cache)
    read_all(url)
    assert touched(before, home) == [] == touched(outside, tmp_path / "outside")
    assert touched(served, cache) == []
    assert verify_cache(home / "mine").problems == ()


def test_a_disk_that_is_itself_a_cache_stays_whole(cache: Path, url: str, home: Path) -> None:
    home.rmdir()
    shutil.copytree(cache, home)
    before = look(home)
    read_all(url)
    assert touched(before, home) == [] and verify_cache(home).problems == ()


def test_files_of_others_inside_a_copy_are_left_alone(url: str, home: Path, tmp_path: Path) -> None:
    copy = FeatureCache(url).path
    planted = plant_in_cache(copy, tmp_path / "outside")
    before, outside = look(copy), look(tmp_path / "outside")
    read_all(url)
    names = {path.relative_to(copy).as_posix() for path in planted}
    assert names.isdisjoint(touched(before, copy)) and touched(outside, tmp_path / "outside") == []


def test_nothing_is_removed_through_a_link(url: str, home: Path, tmp_path: Path) -> None:
    """The shards of a copy were moved to another disk, and a link put in their place."""
    copy = FeatureCache(url).path
    outside = tmp_path / "outside"
    for block in range(6):
        write(outside / "maps" / f"c.{block}.0.0.0.0.0", "x" * LIMIT)
    (copy / "maps").symlink_to(outside / "maps")
    before = look(outside)
    root = CopyRoot()
    write(copy / "tokens" / "c.0.0.0.0.0", "x" * LIMIT)
    with root.room(LIMIT):
        pass
    assert touched(before, outside) == []
    assert not (copy / "tokens" / "c.0.0.0.0.0").exists()
    with pytest.raises(CacheError, match="is a link"):
        FeatureCache(url).read([0])


@pytest.mark.parametrize("content", [None, "", "{}", '{"cache_digest":"' + "0" * 64 + '"}\n', "x" * 2000])
def test_a_directory_without_the_marker_of_its_own_digest_is_no_copy(
    content: str | None, cache: Path, url: str, home: Path
) -> None:
    other = home / ("ab" * 16)
    shutil.copytree(cache, other)
    if content is not None:
        (other / MARKER_NAME).write_text(content)
    before = look(other)
    read_all(url)
    assert touched(before, other) == []


def test_the_marker_itself_is_no_link(cache: Path, url: str, home: Path) -> None:
    copy = FeatureCache(url).path
    marker = (copy / MARKER_NAME).read_text().replace(copy.name, "ab" * 16, 1)
    other = home / ("ab" * 16)
    shutil.copytree(cache, other)
    write(home / "marker").write_text(marker)
    (other / MARKER_NAME).symlink_to(home / "marker")
    before = look(other)
    read_all(url)
    assert touched(before, other) == []


def test_a_copy_of_an_older_version_is_used_again_and_marked(url: str, home: Path) -> None:
    remote = FeatureCache(url)
    remote.read([0, 1, 2])
    (remote.path / MARKER_NAME).unlink()
    again = FeatureCache(url)
    again.read([0, 1, 2])
    assert again.copy is not None and again.copy.requests == 0
    assert (again.path / MARKER_NAME).read_text() == f'{{"cache_digest":"{again.fingerprint}"}}\n'


def test_a_cache_that_lies_where_the_copy_would_is_refused_and_left_alone(
    cache: Path, url: str, home: Path
) -> None:
    place = home / FeatureCache(cache).fingerprint[:32]
    shutil.copytree(cache, place)
    before = look(place)
    with pytest.raises(
        CacheError, match="is no copy of a remote cache; move it away, or set EVL_CACHE_COPY_ROOT to an empty"
    ):
        FeatureCache(url)
    assert look(place) == before


def test_no_folder_of_others_is_looked_into(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home directory may have millions of files."""
    for name in ("src/c/lib/thesis.c", "caches/a/tokens/c.0.0.0.0.0", f"{'ab' * 16}/tokens/c.0.0.0.0.0"):
        write(home / name)
    seen: list[str] = []
    real_scandir, real_listdir = os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(os.fspath(path)) or real_scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path: seen.append(os.fspath(path)) or real_listdir(path))
    read_all(url)
    copies = {path.parent for path in home.glob(f"*/{MARKER_NAME}")}
    inside = {Path(place) for place in seen if Path(place).is_relative_to(home)} - {home}
    assert len(copies) == 1 and all(copies & {place, *place.parents} for place in inside)


def test_the_message_of_a_full_disk_names_an_empty_directory(
    url: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FeatureCache(url)

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CacheError, match="set EVL_CACHE_COPY_ROOT to an empty directory on another disk"):
        remote.read([0])


@pytest.mark.parametrize("chunk_keys", ["flat", "folders"])
def test_shards_of_a_copy_are_found_where_its_first_block_was_never_fetched(
    tmp_path: Path, chunk_keys: str
) -> None:
    spec, clips = cache_spec(chunk_keys=chunk_keys), clip_list([i % 3 for i in range(13)], classes=3)
    create_cache(tmp_path, spec, clips.clips, origin={}, created_with={})
    shards = [layout.shard(tmp_path, block) for layout in array_layouts(spec).values() for block in (1, 2)]
    for shard in shards:
        write(shard, b"x")
    assert sorted(copy_root._shard_files(tmp_path)) == sorted(shards)
