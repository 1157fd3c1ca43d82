"""Copies of remote caches beside processes that stand still, files that a person removed, and a system without threads."""

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.feature_caches import TOWER, write_cache
from tests.support.servers import FaultyServer, faulty_server

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.batches import FeatureLoader
from evl_cache.errors import CacheError, EvlCacheError, WaitEnded
from evl_cache.store import FeatureCache, waits_end_when
from evl_cache.store.copying.grown import copy_to_directory
from evl_cache.store.objects.objects import open_objects
from evl_cache.store.objects.workers import Workers
from evl_cache.store.reading import copy_root
from evl_cache.store.reading.copy_root import ACCOUNT_NAME, CopyRoot, write_in_copy
from evl_cache.store.reading.fetch_threads import FetchThreads

SAMPLES, LIMIT = 24, 3_000_000
LARGE = replace(TOWER, image_size=112, width=64)  # 140 kB of tokens and 460 kB of maps a sample


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "a"
    write_cache(path, labels=[i % 3 for i in range(SAMPLES)], tower=LARGE, codec="raw", block_clips=3)
    return path


@pytest.fixture
def server(cache: Path) -> Iterator[FaultyServer]:
    with faulty_server(cache.parent) as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "home"))
    monkeypatch.setenv("EVL_CACHE_COPY_GB", str(LIMIT / 1e9))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def taken(home: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in home.rglob("c.*"))


def check_sample(remote: FeatureCache, cache: Path, sample: int) -> None:
    for found, expected in zip(remote.read([sample]), FeatureCache(cache).read([sample]), strict=True):
        assert found is not None and expected is not None and all(map(torch.equal, found, expected))


def within(seconds: float, act: threading.Thread) -> None:
    act.start()
    act.join(timeout=seconds)
    assert not act.is_alive()


def test_a_file_that_a_process_stands_still_in_removing_is_fetched_again(
    cache: Path, server: FaultyServer, home: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    remote.read([0])
    (shard,) = remote.path.glob("maps/c.*")
    with shard.open("r+b") as removed:
        fcntl.flock(removed, fcntl.LOCK_EX)
        within(30, threading.Thread(target=check_sample, args=(remote, cache, 0), daemon=True))


def test_a_process_that_stands_still_with_the_account_is_waited_for_once(
    cache: Path, server: FaultyServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_root, "_LOCK_PATIENCE_S", 1.0)
    remote = FeatureCache(f"{server.url}/a")
    waits, locked = [], copy_root._locked

    def noting(descriptor: int, patience_s: float, *others: object) -> bool:
        waits.append(patience_s)
        return locked(descriptor, min(patience_s, 0.01), *others)  # type: ignore[arg-type]

    monkeypatch.setattr(copy_root, "_locked", noting)
    with (home / ACCOUNT_NAME).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for sample in (0, 4, 8):
            check_sample(remote, cache, sample)
    assert len(waits) > 3 and waits[0] == 1.0 and max(waits[1:]) < 1.0
    check_sample(remote, cache, 12)
    check_sample(remote, cache, 16)
    assert waits[-1] == 1.0  # it goes on by now


def test_a_process_that_stands_still_with_a_file_is_waited_for_once(
    server: FaultyServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    assert remote.copy is not None
    held, root, now, waits = remote.copy.shards.hold("maps", 0, range(3)), CopyRoot(limit_nbytes=1), [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(copy_root, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    for number in range(4):
        if number == 3:
            held.release()
        before = now[0]
        with root.room(1):
            waits.append(now[0] - before)
    assert waits[0] > copy_root._PATIENCE_S > 10 * max(waits[1:]) and not waits[3] and not held.path.exists()


@pytest.mark.parametrize("end", ["end_waits", "asked"])
def test_who_waits_for_a_process_that_stands_still_with_the_account_is_called_away(
    server: FaultyServer, home: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_root, "_LOCK_PATIENCE_S", 60.0)
    remote, is_asked, begun = FeatureCache(f"{server.url}/a"), threading.Event(), threading.Event()
    caught: list[BaseException] = []
    locked = copy_root._locked

    def telling(*words: object) -> bool:
        begun.set()
        return locked(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(copy_root, "_locked", telling)

    def read() -> None:
        try:
            remote.read([0])
        except CacheError as error:
            caught.append(error)

    with (home / ACCOUNT_NAME).open("a") as file, waits_end_when(is_asked.is_set):
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert begun.wait(30)
        started = time.monotonic()
        remote.end_waits() if end == "end_waits" else is_asked.set()
        thread.join(timeout=30)
        assert not thread.is_alive() and time.monotonic() - started < 10
    assert [type(error) for error in caught] == [WaitEnded]


def test_an_account_that_is_too_low_is_noticed(server: FaultyServer, home: Path) -> None:
    """As older versions leave it, which keep none, and two processes on a disk without locks."""
    remote, most = FeatureCache(f"{server.url}/a"), 0
    for sample in range(SAMPLES):
        remote.read([sample])
        (home / ACCOUNT_NAME).write_text(f"{0:020d}\n")
        most = max(most, taken(home))
    assert LIMIT // 2 < most < LIMIT + LIMIT // 16 + 1_500_000 < taken(server.root)


def test_an_account_that_is_removed_is_made_again_by_all(server: FaultyServer, home: Path) -> None:
    one, other = FeatureCache(f"{server.url}/a"), FeatureCache(f"{server.url}/a")
    one.read([0])
    (home / ACCOUNT_NAME).unlink()
    other.read([6])
    one.read([12])
    assert int((home / ACCOUNT_NAME).read_text()) == taken(home)


def test_copies_that_a_person_removes_are_fetched_again_and_counted(
    cache: Path, server: FaultyServer, home: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    remote.read([0])
    shutil.rmtree(home)
    for sample in (0, 4, 8):
        check_sample(remote, cache, sample)
    assert int((home / ACCOUNT_NAME).read_text()) == taken(home) > 0
    check_sample(FeatureCache(f"{server.url}/a"), cache, 12)


def test_a_damaged_shard_heals_while_another_thread_holds_it(
    cache: Path, server: FaultyServer, home: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    remote.read([1])
    assert remote.copy is not None
    held = remote.copy.shards.hold("tokens", 0, range(3, 6))
    with held.path.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        last = file.read(1)
        file.seek(-9, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    held.reader = None  # as who holds it opens it now
    check_sample(remote, cache, 1)
    held.release()


def test_what_was_to_be_fetched_ahead_when_waits_were_ended_takes_no_room(
    server: FaultyServer, home: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    assert remote.copy is not None
    shards, wanted = remote.copy.shards, [(block, range(3)) for block in range(8)]
    shards.prefetch(wanted, ["tokens"])
    before = set(shards._ahead)
    remote.end_waits()
    shards.prefetch(wanted[4:], ["tokens"])
    assert before and set(shards._ahead) - before


def test_without_threads_there_is_an_error_and_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads = FetchThreads(2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            with pytest.raises(CacheError, match=r"no thread to fetch with .*; raise the limit of processes"):
                threads.submit(lambda: None).result(timeout=30)
    assert threads.submit(lambda: None).result(timeout=30) is None


@pytest.mark.parametrize("of", ["copying", "workers", "reading ahead"])
def test_without_threads_other_work_ends_with_a_line(
    cache: Path, tmp_path: Path, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    opened = FeatureCache(cache)
    loader = FeatureLoader(opened, slice(None), layers=2, batch=4)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(EvlCacheError, match=r"no thread to .*; use fewer, or raise the limit of processes"):
        if of == "copying":
            copy_to_directory(cache, tmp_path / "copy")
        elif of == "workers":
            with Workers(2, open_objects(cache)) as workers:
                next(workers.each(str, [1]))
        else:
            next(loader.epoch())
    assert not list(tmp_path.rglob("*.lock"))  # which would not beat


def test_too_many_open_files_are_told_with_their_own_remedy(
    server: FaultyServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, opens = FeatureCache(f"{server.url}/a"), os.open

    def none_left(path: object, *words: int, **others: int) -> int:
        if Path(str(path)).name.startswith("c."):
            raise OSError(errno.EMFILE, "Too many open files")
        return opens(path, *words, **others)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "open", none_left)
    with pytest.raises(CacheError, match=r"Too many open files; raise the limit of open files .*ulimit -n"):
        remote.read([0])


def test_an_account_that_is_no_file_is_told_in_a_line(server: FaultyServer, home: Path) -> None:
    remote = FeatureCache(f"{server.url}/a")
    os.mkfifo(home / ACCOUNT_NAME)
    with pytest.raises(CacheError, match=rf"cannot write .*{ACCOUNT_NAME}: Illegal seek; free space, or set"):
        remote.read([0])


def test_a_small_file_that_does_not_fit_leaves_nothing_and_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CacheError, match="No space left on device"):
        write_in_copy(tmp_path / "clips.parquet", b"content")
    assert not list(tmp_path.iterdir())
