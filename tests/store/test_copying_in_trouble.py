"""Copies whose servers are in trouble: damaged parts asked for again, and threads that end at once with the first error."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.feature_caches import write_cache
from tests.support.forked_commands import Commands
from tests.support.gated_proxy import gated_proxy
from tests.support.servers import KEYS, FaultyServer, faulty_server, s3_server
from tests.support.soon import SOON_S
from tests.support.store_helpers import differences, tree

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.caches.share import pull, push
from evl_cache.errors import CacheDamaged, CacheError, Unreachable
from evl_cache.store.disk.publish import stage_file
from evl_cache.store.objects.objects import open_objects
from evl_cache.store.reading import attempts, shard_parts
from evl_cache.store.reading.shard_parts import ShardParts
from evl_cache.store.shards.codec import ChunkCodec
from evl_cache.store.shards.shard import ShardRecord, ShardWriter

LABELS = tuple(i % 3 for i in range(30))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copied")
    write_cache(folder / "a", labels=LABELS, failed=(3,))
    shutil.rmtree(folder / "a" / "locks")
    return folder / "a"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_BACKOFF_S", 0.001)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def faulty(cache: Path) -> Iterator[FaultyServer]:
    with faulty_server(cache.parent) as server:
        yield server


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    forked = Commands(tmp_path_factory.mktemp("commands"))
    yield forked
    forked.close()


def flipped(body: bytes, at: int = 5) -> bytes:
    return body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :]


def copied(target: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(target).items() if not name.startswith("locks/")}


def test_a_damaged_part_alone_is_asked_for_again(
    faulty: FaultyServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_parts, "_PART_NBYTES", 4000)
    spoilt: dict[str, int] = {}

    def fault(path: str, body: bytes) -> bytes | None:
        if "/c." not in path or spoilt.setdefault(path, 0) > 1:
            return None
        spoilt[path] += 1
        return flipped(body) if spoilt[path] == 2 else None  # the second part of each file

    faulty.fault = fault
    pull(f"{faulty.url}/a", str(tmp_path / "a"))
    assert differences(copied(tmp_path / "a"), tree(cache)) == []
    again = {path: sum(n for name, n in faulty.served if name == path) for path in spoilt}
    more = {path: nbytes - (cache.parent / path.lstrip("/")).stat().st_size for path, nbytes in again.items()}
    assert sum(more.values()) > 0 and max(more.values()) <= 5000


def test_small_files_that_arrive_damaged_once_are_asked_for_again(
    faulty: FaultyServer, cache: Path, tmp_path: Path
) -> None:
    damaged: set[str] = set()

    def once(path: str, body: bytes) -> bytes | None:
        if "/c." in path or path in damaged or not body:
            return None
        damaged.add(path)
        return flipped(body, len(body) // 2)

    faulty.fault = once
    pull(f"{faulty.url}/a", str(tmp_path / "a"))
    assert differences(copied(tmp_path / "a"), tree(cache)) == []
    assert {"/a/zarr.json", "/a/clips.jsonl", "/a/manifest.json", "/a/done/000001.json"} <= damaged


def test_what_stays_damaged_is_told_to_who_keeps_the_cache(faulty: FaultyServer, tmp_path: Path) -> None:
    faulty.fault = lambda path, body: flipped(body) if "/maps/c.2." in path else None
    with pytest.raises(
        CacheDamaged,
        match=r"/a/maps/c\.2\S*: chunk 0 arrives damaged, 4 times, and the cache has not changed meanwhile; tell who keeps",
    ) as raised:
        pull(f"{faulty.url}/a", str(tmp_path / "a"))
    assert "repair" not in str(raised.value)
    assert staged(tmp_path / "a") == [] and not (tmp_path / "a" / "manifest.json").exists()


@pytest.mark.parametrize("where", ["/tokens/c.1.", "/done/000001.json"])
def test_a_source_that_became_another_is_told_from_damage(
    faulty: FaultyServer, tmp_path: Path, where: str
) -> None:
    write_cache(tmp_path / "www" / "a", labels=LABELS, seed=5)

    def fault(path: str, body: bytes) -> bytes | None:
        if where in path:
            faulty.root = tmp_path / "www"
            return flipped(body)
        return None

    faulty.fault = fault
    with pytest.raises(CacheError, match="the source changed; run the same command again"):
        pull(f"{faulty.url}/a", str(tmp_path / "a"), threads=1)


@pytest.mark.parametrize("codec", [ChunkCodec("raw"), ChunkCodec("zstd", zstd_level=1)])
@pytest.mark.parametrize("part_nbytes", [1, 3000, 1 << 20])
def test_parts_make_up_the_file_and_each_flipped_byte_is_found_in_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: ChunkCodec, part_nbytes: int
) -> None:
    monkeypatch.setattr(shard_parts, "_PART_NBYTES", part_nbytes)
    content, record = shard(tmp_path, codec)
    parts, rng = ShardParts(record, codec), random.Random(0)
    assert next(iter(parts))[0] == 0 and sum(nbytes for _, nbytes in parts) == record.size
    assert all(a + n == b for (a, n), (b, _) in zip(parts, list(parts)[1:], strict=False))
    for start, nbytes in parts:
        data = content[start : start + nbytes]
        assert parts.wrong(start, nbytes, data) is None
        assert parts.wrong(start, nbytes, data[:-1]) is not None
        for at in {0, nbytes - 1, *(rng.randrange(nbytes) for _ in range(40))}:
            assert parts.wrong(start, nbytes, flipped(data, at)) is not None, (start, at)


def test_a_shard_that_is_laid_out_otherwise_comes_in_parts_too(tmp_path: Path) -> None:
    codec = ChunkCodec("raw")
    content, record = shard(tmp_path, codec)
    other = ShardRecord(
        size=record.size + 7,
        sha256=record.sha256,
        packed_nbytes=record.packed_nbytes,
        packed_checksums=record.packed_checksums,
    )
    ((start, nbytes),) = ShardParts(other, codec)
    assert (start, nbytes) == (0, record.size + 7)
    assert ShardParts(other, codec).wrong(0, nbytes, bytes(7) + content) is None


def shard(folder: Path, codec: ChunkCodec) -> tuple[bytes, ShardRecord]:
    """A shard with large and small chunks, of which one is missing."""
    rng = np.random.default_rng(0)
    with stage_file(folder) as staged_file:
        writer = ShardWriter(staged_file, grid=(3, 2), codec=codec)
        for number in range(5):
            writer.append(None if number == 2 else rng.integers(0, 9, size=9001, dtype=np.uint8))
        record = writer.close()
        staged_file.publish(folder / "shard")
    return (folder / "shard").read_bytes(), record


def test_the_first_error_ends_what_other_threads_wait_for(faulty: FaultyServer, tmp_path: Path) -> None:
    """Without that a pull would wait for the silent server until patience ends, two minutes by default."""
    waited_for, over = threading.Event(), threading.Event()

    def fault(path: str, body: bytes) -> int | None:
        if "/tokens/c.0." in path:
            waited_for.set()
            over.wait(100)
        if "/tokens/c.3." in path:
            assert waited_for.wait(60)
            return 418
        return None

    faulty.fault = fault
    try:
        since = time.monotonic()
        with pytest.raises(Unreachable, match="418"):
            pull(f"{faulty.url}/a", str(tmp_path / "a"), threads=6)
        assert time.monotonic() - since < 20
    finally:
        over.set()
    assert staged(tmp_path / "a") == []


def staged(target: Path) -> list[str]:
    """Staged files, and locks that are held."""
    return [name for name in tree(target) if "/.tmp-" in f"/{name}" or name.startswith("locks/")]


@pytest.mark.timed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("more", [(), ("--layers", "3"), ("--codec", "raw")])
def test_a_signal_ends_a_pull_from_a_silent_server(
    faulty: FaultyServer, tmp_path: Path, commands: Commands, number: int, more: tuple[str, ...]
) -> None:
    waited_for, over = threading.Event(), threading.Event()

    def fault(path: str, body: bytes) -> None:
        if "/c.1." in path or "/c.2." in path:
            waited_for.set()
            over.wait(100)

    faulty.fault = fault
    try:
        pid = commands.start(
            "pull", f"{faulty.url}/a", tmp_path / "a", *more, EVL_CACHE_COPY_ROOT=str(tmp_path / "copies")
        )
        assert waited_for.wait(60)
        assert_ends_soon(commands, pid, number)
    finally:
        over.set()
    assert staged(tmp_path / "a") == []
    faulty.fault = lambda path, body: None
    pull(f"{faulty.url}/a", str(tmp_path / "a"), **({"layers": [3]} if "--layers" in more else {}),
         **({"codec": "raw"} if "--codec" in more else {}))  # fmt: skip
    assert (tmp_path / "a" / "manifest.json").is_file()


@pytest.mark.timed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_push_to_a_silent_bucket(
    cache: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with s3_server(tmp_path / "log") as endpoint, gated_proxy(endpoint) as proxy:
        proxy.holds = lambda method, path: method == "PUT" and "/tokens/c." in path
        pid = commands.start("push", cache, "s3://lab/a", **KEYS, AWS_ENDPOINT_URL=proxy.url)
        assert proxy.held.wait(60)
        assert_ends_soon(commands, pid, number)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        assert push(cache, "s3://lab/a").cache_digest is not None
        there = open_objects("s3://lab/a")
        assert {name: there.get(name, most_nbytes=1 << 30) for name in tree(cache)} == tree(cache)


def assert_ends_soon(commands: Commands, pid: int, number: int) -> None:
    since = time.monotonic()
    os.kill(pid, number)
    ended = commands.wait(pid)
    assert time.monotonic() - since < SOON_S
    assert ended.status in (128 + number, 130)
    assert "Traceback" not in ended.stderr


def test_a_signal_ends_a_pull_that_waits_for_another_jobs_lock(
    faulty: FaultyServer, tmp_path: Path, commands: Commands
) -> None:
    waited_for, over = threading.Event(), threading.Event()

    def fault(path: str, body: bytes) -> None:
        if "/c.0." in path:
            waited_for.set()
            over.wait(100)

    faulty.fault = fault
    try:
        first = commands.start("pull", f"{faulty.url}/a", tmp_path / "a", "--threads", 1)
        assert waited_for.wait(60)
        second = commands.start("pull", f"{faulty.url}/a", tmp_path / "a", "--threads", 2)
        marked = tmp_path / "a" / "done" / "000002.json"
        deadline = time.monotonic() + 60
        while not marked.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert_ends_soon(commands, second, signal.SIGTERM)
        assert_ends_soon(commands, first, signal.SIGTERM)
    finally:
        over.set()
