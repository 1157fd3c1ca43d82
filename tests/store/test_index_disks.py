"""An index on disks that map nothing, replace what is open, or let a process open few files: the marks are there still."""

import errno
import mmap
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from evl_cache import FeatureCache
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store import verify_cache
from evl_cache.store.format import index_file
from evl_cache.store.format.index import believed_index
from evl_cache.store.reading.blocks_done import BlocksDone
from evl_cache.store.writing import segments
from evl_cache.store.writing.segments import write_segment_of
from tests.support.feature_caches import write_cache
from tests.support.warm_python import ROOT, warm_python


def failing(monkeypatch: pytest.MonkeyPatch, number: int, *, start: int = 0) -> None:
    """From now on reading the index fails, from a place in it on."""
    pread = os.pread

    def read(descriptor: int, count: int, offset: int) -> bytes:
        if offset >= start and os.readlink(f"/proc/self/fd/{descriptor}").endswith("index.bin"):
            raise OSError(number, os.strerror(number))
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", read)


def test_where_no_memory_is_left_to_map_an_index_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache", failed=(3,))

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    refusing = SimpleNamespace(mmap=refuse, ACCESS_READ=mmap.ACCESS_READ)
    monkeypatch.setattr(index_file, "mmap", refusing)
    opened = FeatureCache(cache.path)
    assert opened.index_digest == cache.fingerprint and opened.failures == cache.failures


def test_an_open_cache_goes_on_by_its_marks_where_another_machine_replaced_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "is_local", lambda path: False)
    opened = FeatureCache(write_cache(tmp_path / "cache").path)
    expected = FeatureCache(opened.path).read([0, 12])[0]
    failing(monkeypatch, errno.ESTALE)  # another machine replaced it
    assert all(np.array_equal(a, b) for a, b in zip(opened.read([0, 12])[0], expected, strict=True))


def test_a_cache_opens_by_its_marks_while_another_machine_replaces_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache")
    failing(monkeypatch, errno.ESTALE)  # another machine replaced it
    opened = FeatureCache(cache.path)
    assert opened.index_digest is None and opened.is_complete


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureCache:
    """A cache of ten blocks that is not complete, with five segments."""
    cache = write_cache(tmp_path / "cache", block_clips=1, labels=[0] * 10)
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 2)
    for name in ("manifest.json", "index.bin"):
        (cache.path / name).unlink()
    for block in range(0, 10, 2):
        assert write_segment_of(cache.path, cache.spec, block)
    return cache


def test_segments_take_no_open_files(growing: FeatureCache) -> None:
    before = len(os.listdir("/proc/self/fd"))
    done = BlocksDone(growing.path, growing.spec)
    assert len(done.files) == 10
    assert len(os.listdir("/proc/self/fd")) == before


def test_blocks_that_were_known_by_segments_are_read_after_these_are_gone(growing: FeatureCache) -> None:
    opened = FeatureCache(growing.path)
    shutil.rmtree(growing.path / "segments")
    assert opened.read(slice(None))[0][0].shape[0] == 10


def test_an_index_that_is_gone_from_a_process_to_another_is_named(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache")
    index = believed_index(cache.path, cache.spec)
    assert index is not None
    again, arguments = index.__reduce__()[:2]
    (cache.path / "index.bin").unlink()
    with pytest.raises(CacheDamaged, match="open the cache again"):
        again(*arguments)


def test_labels_stay_where_an_index_is_cut_off_while_it_is_open(tmp_path: Path) -> None:
    code = (
        "import os, sys; from evl_cache import FeatureCache; cache = FeatureCache(sys.argv[1]);"
        "os.truncate(cache.path / 'index.bin', 4096); print(cache.labels.sum(), cache.clips.labels.sum())"
    )
    path = write_cache(
        tmp_path / "cache", block_clips=100, labels=[1] * 2000
    ).path  # labels lie beyond a page
    found = subprocess.run(
        [warm_python(), "-c", code, str(path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (found.returncode, found.stdout.split()) == (0, ["2000", "2000"]), found.stderr


@pytest.mark.parametrize("start", [0, 1, 5000])
def test_an_index_that_the_disk_cannot_read_is_a_problem_of_the_cache_and_ends_no_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    cache = write_cache(tmp_path / "cache")
    failing(monkeypatch, errno.EIO, start=start)
    found = verify_cache(cache.path)
    assert ["index.bin" in problem.reason for problem in found.problems] == [True]
    assert found.blocks_done == cache.spec.num_blocks


def test_a_block_is_committed_where_the_disk_refuses_a_look_at_what_its_segment_needs(
    growing: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> NoReturn:
        raise CacheError(f"cannot look at {path}")

    monkeypatch.setattr(segments, "is_there", refuse)
    assert not write_segment_of(growing.path, growing.spec, 0)
