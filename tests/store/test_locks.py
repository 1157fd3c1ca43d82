"""Locks where the disk has no hard links, keeps what is removed, or holds what is not ours."""

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from evl_cache.errors import CacheError
from evl_cache.store.disk import lock_files, locks
from evl_cache.store.disk.locks import BlockLock, LockWatcher
from evl_cache.store.writing.leftovers import remove_leftovers
from tests.support.store_helpers import extract_small, load_clips, tree, watched_changes

NO_LINKS = [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK]


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def taken(watcher: LockWatcher, block: int = 0) -> BlockLock:
    lock = watcher.take(block)
    assert lock is not None
    return lock


@pytest.fixture(params=[0, *NO_LINKS], ids=lambda number: errno.errorcode.get(number, "links"))
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(os, "link", failing(request.param))


@pytest.mark.usefixtures("links")
def test_one_of_many_has_the_lock_and_gives_it_back(tmp_path: Path) -> None:
    barrier, held = threading.Barrier(8), list[BlockLock | None]()

    def take() -> None:
        watcher = LockWatcher(tmp_path)
        barrier.wait()
        held.append(watcher.take(0))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lock,) = [lock for lock in held if lock is not None]
    assert lock.is_held()
    assert [path.name for path in tmp_path.iterdir()] == ["000000.lock"]
    assert LockWatcher(tmp_path).take(0) is None
    lock.release()
    assert list(tmp_path.iterdir()) == []
    taken(LockWatcher(tmp_path)).release()


@pytest.mark.usefixtures("links")
def test_a_lock_that_stands_still_is_taken_over_and_its_holder_sees_it(tmp_path: Path) -> None:
    paused = taken(LockWatcher(tmp_path, beat_s=3600))
    watcher = LockWatcher(tmp_path, expiry_s=0.1)
    while (lock := watcher.take(0)) is None:
        time.sleep(0.02)
    assert lock.is_held()
    assert not paused.is_held()
    paused.release()
    assert lock.is_held()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("links")
def test_a_lock_taken_aside_by_mistake_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = taken(LockWatcher(tmp_path, beat_s=3600))
    watcher = LockWatcher(tmp_path, expiry_s=3600)
    assert watcher.take(0) is None
    lock._beat()  # after the other's last look
    watcher._remove_abandoned(lock.path)
    assert lock.is_held()
    assert [path.name for path in tmp_path.iterdir()] == ["000000.lock"]
    lock.release()


@pytest.mark.parametrize("content", [b"", b"0" * 20, b'00000000000000000000{"host": "a", "mach'])
def test_a_lock_whose_maker_died_while_writing_it_is_taken_over_by_time_alone(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "000000.lock").write_bytes(content)
    watcher = LockWatcher(tmp_path, expiry_s=0.2)
    began = time.monotonic()
    while (lock := watcher.take(0)) is None:
        time.sleep(0.02)
    assert time.monotonic() - began >= 0.2
    lock.release()


def test_without_hard_links_a_full_disk_leaves_no_half_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writes = os.write, iter(range(9))
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(
        os, "write", lambda *args: failing(errno.ENOSPC)() if next(writes) == 1 else real(*args)
    )
    with pytest.raises(CacheError, match=r"cannot lock .*000000\.lock: No space left on device; free space"):
        LockWatcher(tmp_path).take(0)
    assert list(tmp_path.iterdir()) == []


FOREIGN = (
    ".nfs0000000012345678",
    "notes.txt",
    "my.lock",
    "~000001.lock",
    ".000001.lock-short",
    "12.lock",
    "000001.lock.swp",
)


@pytest.mark.parametrize(
    "where", ["give_second_name", "open_lock", "BlockLock", "is_held", "remove_leftover"]
)
def test_a_signal_at_any_moment_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """One that raises in the main thread, while the lock is taken or given back."""
    owner: object = {"give_second_name": lock_files, "is_held": locks.BlockLock}.get(where, locks)
    real = getattr(owner, where)
    struck: list[object] = []

    def strike(*given: object, **more: object) -> object:
        found = None if where == "remove_leftover" and not struck else real(*given, **more)
        if not struck:
            struck.append(found)
            raise KeyboardInterrupt
        return found

    watcher = LockWatcher(tmp_path / "locks")
    if where == "give_second_name":
        taken(watcher, 1).release()  # the directory is there
    monkeypatch.setattr(owner, where, strike)
    with pytest.raises(KeyboardInterrupt):
        taken(watcher, 1).release()
    assert struck and list((tmp_path / "locks").iterdir()) == []
    if isinstance(struck[0], BlockLock):
        struck[0].release()  # its thread


def test_a_sweep_removes_locks_of_the_dead_and_nothing_that_is_not_ours(tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".000001.lock-0123456789abcdef").write_bytes(b"")
    watcher, cleaned = LockWatcher(tmp_path), list[int]()
    (tmp_path / "000007.lock").write_bytes(b'00000000000000000000{"host":"","machine":"","pid":1}')
    lock = taken(watcher, 3)
    assert not watcher.sweep(own=lock, clean=cleaned.append)
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*FOREIGN, "000007.lock"))
    assert cleaned == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ESTALE, errno.EACCES, errno.EIO])
def test_what_cannot_be_removed_stays_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / ".000001.lock-0123456789abcdef").write_bytes(b"")
    (tmp_path / ".tmp-host-1-0123456789abcdef").write_bytes(b"")
    watcher = LockWatcher(tmp_path)
    monkeypatch.setattr(os, "unlink", failing(number))
    lock = taken(watcher, 3)
    assert watcher.sweep(own=lock, clean=lambda block: None)
    remove_leftovers(tmp_path)
    lock.release()


def test_where_the_disk_refuses_a_look_nobody_is_said_to_have_taken_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = taken(LockWatcher(tmp_path))
    monkeypatch.setattr(Path, "open", failing(errno.EIO))
    with pytest.raises(CacheError, match=r"cannot read .*000000\.lock: Input/output error; check the disk"):
        lock.is_held()
    lock.release()


def test_a_lock_that_cannot_be_read_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    (tmp_path / "000000.lock").mkdir()  # as one whose maker's umask closed it to other users
    with pytest.raises(CacheError, match=r"cannot read .*000000\.lock"):
        LockWatcher(tmp_path).wait_for("000000")


@pytest.mark.parametrize("looks", [4, None])
def test_a_lock_that_stays_stale_is_an_error_and_one_that_was_stale_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int | None
) -> None:
    lock, read, stale = taken(LockWatcher(tmp_path)), Path.read_bytes, itertools.count()

    def read_bytes(path: Path) -> bytes:
        if looks is None or next(stale) < looks:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    if looks is None:
        with pytest.raises(CacheError, match=r"cannot read .*000000\.lock: Stale file handle"):
            LockWatcher(tmp_path).take(0)
    else:
        assert LockWatcher(tmp_path).take(0) is None
        lock.release()
        assert not (tmp_path / "000000.lock").exists()


def test_locks_in_a_directory_that_is_gone_are_an_error(tmp_path: Path) -> None:
    watcher = LockWatcher(tmp_path / "locks")
    (tmp_path / "locks").rmdir()
    with pytest.raises(CacheError, match="cannot lock"):
        watcher.wait_for("cache")


@pytest.mark.usefixtures("links")
def test_nothing_that_an_extraction_has_open_loses_its_name(motions: Path, tmp_path: Path) -> None:
    """NFS keeps such a file as `.nfs…`, which nobody can remove before its last close."""
    wrong: list[str] = []

    def saw(name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if name in ("unlink", "rename", "replace"):
            lost = os.path.abspath(args[0 if name == "unlink" else 1])
            opened = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
            wrong.extend(f"{name} {lost}" for link in opened if _target(link) == lost)
        return call()

    with watched_changes(saw):
        extract_small(load_clips(motions), tmp_path / "cache")
    assert wrong == []
    assert "manifest.json" in tree(tmp_path / "cache")


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


@pytest.mark.usefixtures("links")
def test_a_lock_that_cannot_be_opened_after_it_was_taken_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def fails_to_open_what_is_there(path: Any, flags: int, *mode: int, **more: Any) -> int:
        if str(path).endswith(".lock") and not flags & os.O_CREAT:
            failing(errno.EIO)()
        return real(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", fails_to_open_what_is_there)
    with pytest.raises(CacheError, match=r"cannot lock .*000000\.lock: Input/output error"):
        LockWatcher(tmp_path).take(0)
    assert list(tmp_path.iterdir()) == []
