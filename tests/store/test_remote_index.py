"""Caches behind URLs by their index: what opening costs, rows that come as they are read, and damage at both ends."""

import os
import pickle
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.servers import FaultyServer, faulty_server
from tests.support.warm_python import warm_python

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.caches.info import describe
from evl_cache.caches.listing import list_caches
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store import FeatureCache
from evl_cache.store.format import manifest as manifest_module
from evl_cache.store.reading import attempts, index_copy

BLOCKS = 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of many blocks."""
    path = tmp_path_factory.mktemp("indexed") / "a"
    write_cache(path, labels=[i % 3 for i in range(BLOCKS)], failed=(3, 17), block_clips=1)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "a"
    write_cache(path, labels=(0, 1, 2, 0), failed=(2,), block_clips=2)
    return path


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setattr(attempts, "_BACKOFF_S", 0.0001)
    patience_of_attempts(monkeypatch)
    return tmp_path / "copies"


@pytest.fixture
def server(cache: Path) -> Iterator[FaultyServer]:
    with faulty_server(cache.parent) as found:
        yield found


def asked(server: FaultyServer) -> list[str]:
    """Paths inside the cache of the requests since the last call."""
    found = [path.removeprefix("/a/") for path in server.asked]
    server.asked.clear()
    return found


def assert_same(one: FeatureCache, other: FeatureCache) -> None:
    """What readers are told and read of two caches is the same."""
    assert one.failures == other.failures and one.provenance == other.provenance
    assert one.fingerprint == other.fingerprint and np.array_equal(one.labels, other.labels)
    assert np.array_equal(one.is_valid, other.is_valid) and one.is_complete and not one.damaged_marks
    samples = np.flatnonzero(other.is_valid).tolist()
    for got, expected in zip(one.read(samples), other.read(samples), strict=True):
        assert got is not None and expected is not None
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def without_index(path: str, body: bytes) -> int | None:
    return 404 if path.endswith("/index.bin") else None


def test_opening_takes_five_requests_however_many_blocks_there_are_and_two_the_next_time(
    server: FaultyServer, cache: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    first = ["clips.jsonl", "grown.json", "index.bin", "index.bin", "manifest.json", "zarr.json"]
    assert sorted(asked(server)) == first
    assert_same(remote, FeatureCache(cache))
    paths = asked(server)
    assert paths.count("index.bin") == 1, "rows of neighbouring blocks come by one request"
    assert not any(path.startswith("done/") or path.endswith(".json") for path in paths)
    again = FeatureCache(f"{server.url}/a")
    assert asked(server) == ["zarr.json", "manifest.json", "grown.json"]
    assert_same(again, FeatureCache(cache))
    assert asked(server) == [] and not list(remote.path.glob("done/*"))


def test_of_a_large_manifest_only_the_beginning_is_asked_for_the_next_time(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "_BEGINNING_NBYTES", 400)
    FeatureCache(f"{server.url}/a")
    assert sorted(asked(server)) == [
        "clips.jsonl",
        "grown.json",
        *["index.bin"] * 2,
        *["manifest.json"] * 2,
        "zarr.json",
    ]
    server.served.clear()
    assert_same(FeatureCache(f"{server.url}/a"), FeatureCache(cache))
    assert dict(server.served)["/a/manifest.json"] == 400
    # What was proved is here: damage to the rest of the manifest changes nothing, and damage to its digest is found.
    server.fault = lambda path, body: body[:-9] + bytes(9) if path == "/a/manifest.json" else None
    assert_same(FeatureCache(f"{server.url}/a"), FeatureCache(cache))
    (digest,) = {remote.name for remote in Path(os.environ["EVL_CACHE_COPY_ROOT"]).glob("?" * 32)}
    at = (cache / "manifest.json").read_bytes().index(digest.encode())
    wrong = bytearray((cache / "manifest.json").read_bytes())
    wrong[at] = ord("0") if wrong[at] != ord("0") else ord("1")
    server.fault = lambda path, body: bytes(wrong[: len(body)]) if path == "/a/manifest.json" else None
    with pytest.raises(CacheError):
        FeatureCache(f"{server.url}/a")


@pytest.mark.parametrize("kind", ["none", "forbidden", "of another cache", "of another version", "no head"])
def test_without_an_index_that_belongs_to_the_manifest_marks_tell(
    server: FaultyServer, cache: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "of another cache":
        labels = [i % 3 for i in range(BLOCKS)]
        other = write_cache(tmp_path / "other", labels=labels, block_clips=1, seed=5).path
        content = (other / "index.bin").read_bytes()
        server.fault = lambda path, body: content[: len(body)] if path.endswith("/index.bin") else None
    elif kind in ("none", "forbidden"):
        status = 404 if kind == "none" else 403
        server.fault = lambda path, body: status if path.endswith("/index.bin") else None
    else:
        change = (b'"version":1', b'"version":7') if kind == "of another version" else (b"{", b"x")
        server.fault = lambda path, body: body.replace(*change, 1) if path.endswith("/index.bin") else None
    remote = FeatureCache(f"{server.url}/a")
    paths = asked(server)
    assert sum(path.startswith("done/") for path in paths) == BLOCKS
    assert paths.count("index.bin") <= attempts.ATTEMPTS
    assert_same(remote, FeatureCache(cache))
    server.fault = lambda path, body: None
    later = FeatureCache(f"{server.url}/a")  # it was pushed since
    assert asked(server).count("index.bin") == 2
    assert_same(later, FeatureCache(cache))


def test_a_copy_by_marks_heals_on_this_disk(server: FaultyServer, cache: Path) -> None:
    server.fault = without_index
    remote = FeatureCache(f"{server.url}/a")
    (remote.path / "done" / "000002.json").write_text("{}")
    asked(server)
    assert_same(FeatureCache(f"{server.url}/a"), FeatureCache(cache))
    assert "done/000002.json" in asked(server)


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The bytes with a flipped bit, a hole, a piece of themselves elsewhere, or cut off."""
    kind, at = generator.randrange(4), generator.randrange(len(content))
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    nbytes = generator.randrange(1, 200)
    other = generator.randrange(len(content)) if kind == 2 else None
    part = bytes(nbytes) if other is None else content[other : other + nbytes]
    return (content[:at] + part + content[at + len(part) :])[: len(content)]


@pytest.mark.parametrize("seed", range(6))
def test_a_remote_index_with_any_damage_costs_time_and_nothing_else(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    shutil.copytree(small, tmp_path / "www" / "a")
    content, generator = (small / "index.bin").read_bytes(), random.Random(seed)
    local = FeatureCache(small)
    with faulty_server(tmp_path / "www") as server:
        for case in range(10):
            monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / f"copies-{case}"))
            (tmp_path / "www" / "a" / "index.bin").write_bytes(damaged(content, generator))
            assert_same(FeatureCache(f"{server.url}/a"), local)


def test_a_copys_index_with_any_damage_heals(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, generator = FeatureCache(small), random.Random(1)
    with faulty_server(small.parent) as server:
        for _ in range(12):
            remote = FeatureCache(f"{server.url}/a")
            path = remote.path / "index.bin"
            assert_same(remote, local)
            path.write_bytes(damaged(path.read_bytes(), generator))
            assert_same(FeatureCache(f"{server.url}/a"), local)
            assert path.read_bytes()[:4096] == (small / "index.bin").read_bytes()[:4096]


@pytest.mark.parametrize("how", ["damaged", "cut off", "removed", "replaced"])
def test_rows_of_a_copy_that_is_damaged_while_it_is_open_are_fetched_again(
    server: FaultyServer, cache: Path, how: str
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    remote.read([0])
    path = remote.path / "index.bin"
    if how == "damaged":
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(bytes(2000))
    elif how == "cut off":
        os.truncate(path, 5000)
    else:
        path.unlink()
        if how == "replaced":  # as another version of this package might
            path.write_bytes(bytes(100_000))
    asked(server)
    samples = np.flatnonzero(remote.is_valid).tolist()
    expected = FeatureCache(cache).read(samples)[0]
    assert all(torch.equal(a, b) for a, b in zip(remote.read(samples)[0], expected, strict=True))
    assert asked(server).count("index.bin") >= (how in ("damaged", "cut off"))
    if how == "replaced":
        assert path.read_bytes() == bytes(100_000), "a file with another head is not written to"


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_server_that_loses_its_index_after_opening_is_read_by_its_marks(
    server: FaultyServer, cache: Path, how: str
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    server.fault = (
        without_index
        if how == "lost"
        else lambda path, body: bytes(len(body)) if path.endswith("index.bin") else None
    )
    asked(server)
    assert_same(remote, FeatureCache(cache))
    paths = asked(server)
    assert {f"done/{block:06d}.json" for block in range(BLOCKS) if block not in (3, 17)} <= set(paths)
    if how == "lost":  # it is asked for once, and whether it is the cache that changed, too
        assert paths.count("index.bin") == 1 == paths.count("manifest.json")


def test_a_row_that_arrives_damaged_once_is_asked_for_again(server: FaultyServer, cache: Path) -> None:
    remote, seen = FeatureCache(f"{server.url}/a"), []

    def once(path: str, body: bytes) -> bytes | None:
        if not path.endswith("index.bin") or seen:
            return None
        seen.append(path)
        return bytes(len(body))

    server.fault = once
    asked(server)
    assert_same(remote, FeatureCache(cache))
    paths = asked(server)
    assert paths.count("index.bin") == 2 and not any(path.startswith("done/") for path in paths)


def test_rows_that_do_not_come_are_an_error_that_tells_damage_from_change(
    server: FaultyServer, cache: Path, tmp_path: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    server.fault = lambda path, body: 404 if "index.bin" in path or "/done/" in path else None
    with pytest.raises(CacheError, match="though the manifest names it; verify http"):
        remote.read([0])
    write_cache(tmp_path / "a", labels=[i % 3 for i in range(BLOCKS)], block_clips=1, seed=9)
    server.fault, server.root = lambda path, body: None, tmp_path
    with pytest.raises(CacheError, match=r"changed while it was read .*run the same command again") as raised:
        remote.read([0])
    assert not isinstance(raised.value, CacheDamaged)


def test_threads_fetch_no_row_twice(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_copy, "_WINDOW_NBYTES", 1)  # a row a request
    remote, local = FeatureCache(f"{server.url}/a"), FeatureCache(cache)
    asked(server)
    samples, wrong = np.flatnonzero(local.is_valid).tolist(), []

    def read(first: int) -> None:
        order = samples[first:] + samples[:first]
        if not torch.equal(remote.read(order)[0][0], local.read(order)[0][0]):
            wrong.append(first)

    threads = [threading.Thread(target=read, args=(first % 2,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and asked(server).count("index.bin") == len(samples)


_READ = """
import hashlib, sys, numpy as np
from evl_cache.store import FeatureCache
cache = FeatureCache(sys.argv[1])
rows = np.flatnonzero(cache.is_valid)
found = hashlib.sha256()
for sample in np.random.default_rng(int(sys.argv[2])).permutation(rows).tolist():
    cache.read([sample])
for tokens in cache.read(rows)[0]:
    found.update(tokens.numpy().tobytes())
print(found.hexdigest())
"""


def test_two_processes_fill_one_copy(server: FaultyServer, cache: Path) -> None:
    running = [
        subprocess.Popen(
            [warm_python(), "-c", _READ, f"{server.url}/a", str(seed)], stdout=subprocess.PIPE, text=True
        )
        for seed in range(2)
    ]
    found = {process.communicate(timeout=120)[0] for process in running}
    ended = subprocess.run(
        [warm_python(), "-c", _READ, str(cache), "0"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert found == {ended.stdout} and ended.stdout.strip()


def test_a_forked_process_reads_on(server: FaultyServer, cache: Path) -> None:
    remote, local = FeatureCache(f"{server.url}/a"), FeatureCache(cache)
    assert remote.copy is not None and remote.copy.index is not None
    row = remote.copy.index.row(5)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # rows are here; the client of a server need not survive a fork
        os.write(writing, remote.copy.index.row(6)[:8])
        os._exit(0)
    os.waitpid(pid, 0)
    assert local._done.index is not None
    assert os.read(reading, 8) == local._done.index.row(6)[:8] and row == local._done.index.row(5)
    os.close(reading), os.close(writing)


def test_a_cache_with_holes_travels_to_another_process(server: FaultyServer, cache: Path) -> None:
    remote = FeatureCache(f"{server.url}/a")
    travelled = pickle.loads(pickle.dumps(remote))
    asked(server)
    assert_same(travelled, FeatureCache(cache))
    assert asked(server).count("index.bin") == 1


def test_sources_of_a_copy_are_fetched_when_they_are_asked_for(server: FaultyServer, cache: Path) -> None:
    remote, local = FeatureCache(f"{server.url}/a"), FeatureCache(cache)
    asked(server)
    assert remote._done.index is not None and local._done.index is not None
    assert np.array_equal(remote._done.index.sources, local._done.index.sources)
    assert asked(server) == ["index.bin"]


def test_sizes_are_told_without_the_manifest_of_a_large_cache(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "_BEGINNING_NBYTES", 400)
    files = [path for path in cache.rglob("*") if path.is_file()]
    expected = manifest_module.read_manifest(cache, FeatureCache(cache).spec)
    (listed,) = list_caches([f"{server.url}/a"])
    assert asked(server) == ["zarr.json", "grown.json", "manifest.json", "index.bin"]
    assert dict(server.served)["/a/manifest.json"] == 400 and len(files) > len(expected.files)
    shards = sum(path.stat().st_size for path in files if path.name.startswith("c."))
    assert (listed.nbytes, listed.cache_digest) == (shards, expected.digest)
    assert listed.is_complete and listed.blocks_done == BLOCKS
    server.fault = without_index
    assert list(list_caches([f"{server.url}/a"])) == [listed]
    for fault in (lambda path, body: None, without_index):
        server.fault = fault
        told = describe(f"{server.url}/a")
        sizes = [size for size, _ in expected.files.values()]
        assert (told["files"], told["bytes"]) == (len(sizes), sum(sizes))
    server.fault = lambda path, body: 404 if path.endswith("manifest.json") else None
    (listed,) = list_caches([f"{server.url}/a"])
    assert not listed.is_complete and listed.nbytes == 0
