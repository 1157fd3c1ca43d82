"""The disk that lies does what it says, and the store's files and locks stand it."""

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store import FeatureCache, valid_mark
from evl_cache.store.format.manifest import read_manifest
from evl_cache.store.reading import sample_reader
from tests.support.feature_caches import write_cache
from tests.support.lying_disk import NO_HARD_LINKS, Fault, LyingDisk, lying_disk, needs_lying_disks
from tests.support.store_helpers import wait_until


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LyingDisk]:
    needs_lying_disks()
    with lying_disk(tmp_path / "backing", tmp_path / "disk") as disk:
        yield disk


def test_an_honest_disk_is_the_directory_below(disk: LyingDisk, tmp_path: Path) -> None:
    (disk.path / "folder").mkdir()
    (disk.path / "folder" / "a").write_bytes(b"content" * 50_000)
    os.link(disk.path / "folder" / "a", disk.path / "b")
    os.rename(disk.path / "folder" / "a", disk.path / "c")
    assert sorted(path.name for path in disk.path.iterdir()) == ["b", "c", "folder"]
    assert os.path.samefile(disk.path / "b", disk.path / "c")
    assert (disk.path / "c").read_bytes() == b"content" * 50_000
    os.unlink(disk.path / "c")
    assert [path.name for path in (tmp_path / "backing").glob("?")] == ["b"]


def test_an_open_file_without_a_name_is_seen_only_where_names_are_silly(disk: LyingDisk) -> None:
    with (disk.path / "a").open("w+b") as file:
        os.unlink(disk.path / "a")
        assert os.listdir(disk.path) == []
        disk.set(silly_rename=True)
        (name,) = os.listdir(disk.path)
        assert name.startswith(".nfs")
        with pytest.raises(OSError, match="busy"):
            os.unlink(disk.path / name)
        file.write(b"still there")
        file.flush()
        assert os.fstat(file.fileno()).st_size == 11
    # Linux tells such a disk of a last close without waiting for its answer.
    wait_until(lambda: os.listdir(disk.path) == [], what="the name is gone with the last close")


def test_a_fault_hits_the_calls_that_it_names(disk: LyingDisk) -> None:
    disk.set(Fault("write", errno.ENOSPC, at=2, times=1), Fault("mkdir", errno.EIO, times=None, under="here"))
    (disk.path / "a").write_bytes(b"first")
    with pytest.raises(OSError, match="No space"):
        (disk.path / "a").write_bytes(b"second")
    (disk.path / "a").write_bytes(b"third")
    (disk.path / "there").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            (disk.path / "here").mkdir()
    assert disk.faults_met() == 3
    disk.clear()
    (disk.path / "here").mkdir()


def test_a_disk_that_is_gone_comes_back(disk: LyingDisk) -> None:
    (disk.path / "videos").mkdir()
    (disk.path / "videos" / "a").write_bytes(b"video")
    disk.set(Fault("any", errno.ENOTCONN, times=None, under="videos"))
    with pytest.raises(OSError, match="not connected"):
        (disk.path / "videos" / "a").read_bytes()
    (disk.path / "other").write_bytes(b"")
    disk.clear()
    assert (disk.path / "videos" / "a").read_bytes() == b"video"


def test_a_file_that_another_process_replaced_is_stale(disk: LyingDisk) -> None:
    for name in "ab":
        (disk.path / name).write_bytes(name.encode())
    disk.set(stale=True)
    with (disk.path / "a").open("rb", buffering=0) as file:
        subprocess.run(["mv", disk.path / "b", disk.path / "a"], check=True)
        with pytest.raises(OSError, match="Stale"):
            file.read()
    assert (disk.path / "a").read_bytes() == b"b"


def test_links_maps_and_case_can_be_missing(disk: LyingDisk) -> None:
    (disk.path / "a").write_bytes(b"content")
    disk.set(NO_HARD_LINKS, no_mmap=True, ignores_case=True)
    with pytest.raises(PermissionError):
        os.link(disk.path / "a", disk.path / "b")
    with (disk.path / "A").open("rb") as file, pytest.raises(OSError, match="No such device"):
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def test_a_second_client_sees_sizes_late_and_contents_when_it_opens(tmp_path: Path) -> None:
    needs_lying_disks()
    backing = tmp_path / "backing"
    with (
        lying_disk(backing, tmp_path / "one", attributes_s=600) as one,
        lying_disk(backing, tmp_path / "two", attributes_s=600) as two,
    ):
        (one.path / "a").write_bytes(b"1")
        assert (two.path / "a").stat().st_size == 1
        (one.path / "a").write_bytes(b"12345")
        assert (two.path / "a").stat().st_size == 1
        assert (two.path / "a").read_bytes() == b"12345"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["done", "zarr.json", "manifest.json", "clips.jsonl"])
def test_what_the_disk_refuses_to_read_is_not_taken_for_missing_or_damaged(
    disk: LyingDisk, number: int, name: str
) -> None:
    cache = write_cache(disk.path / "cache", labels=(0, 1, 2))
    disk.set(Fault("open", number, times=None, under=f"cache/{name}"))
    with pytest.raises(CacheError, match=rf"cannot read .*{name}.*{os.strerror(number)}; ") as caught:
        if name == "done":
            valid_mark(cache.path, cache.spec, 0)
        FeatureCache(cache.path)
        read_manifest(cache.path, cache.spec)
    assert not isinstance(caught.value, CacheDamaged)


@pytest.mark.parametrize("call", ["open", "read"])
def test_a_description_that_cannot_be_read_is_told_by_a_job_that_goes_on(disk: LyingDisk, call: str) -> None:
    write_cache(disk.path / "cache", labels=(0, 1, 2))
    disk.set(Fault(call, errno.EIO, times=None, under="cache/zarr.json"))
    with pytest.raises(CacheError, match=r"cannot read .*zarr\.json: Input/output error; check the disk"):
        write_cache(disk.path / "cache", labels=(0, 1, 2))


def test_a_disk_that_maps_no_files_is_read_by_calls(disk: LyingDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_reader, "is_local", lambda path: True)
    cache = write_cache(disk.path / "cache", codec="raw")
    expected, _ = FeatureCache(cache.path).read([0])
    disk.set(no_mmap=True)
    found, _ = FeatureCache(cache.path).read([0])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_open_reader_goes_on_where_another_machine_put_the_same_rows_into_a_new_file(
    disk: LyingDisk,
) -> None:
    cache = write_cache(disk.path / "cache", labels=(0, 1, 2))
    expected, _ = cache.read([0, 2])
    disk.set(stale=True)
    shards = list((cache.path / "tokens").glob("c.*"))
    for shard in shards:
        subprocess.run(["cp", shard, shard.with_name("new")], check=True)
        subprocess.run(["mv", shard.with_name("new"), shard], check=True)
    found, _ = cache.read([0, 2])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
def test_features_that_the_disk_refuses_to_read_are_not_called_damaged(disk: LyingDisk, number: int) -> None:
    cache = write_cache(disk.path / "cache", labels=(0, 1, 2))
    disk.set(Fault("read", number, times=None, under="cache/tokens"), no_mmap=True)
    with pytest.raises(CacheError, match=rf"cannot .*read.*{os.strerror(number)}") as caught:
        cache.read([0])
    assert not isinstance(caught.value, CacheDamaged)
    disk.clear()
    cache.read([0])
