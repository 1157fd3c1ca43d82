"""Block locks between jobs on one disk, without trusting any two clocks.

A lock is a small file (`lock_files`), whose holder writes a counter into it from time to time. Whoever finds it
watches the counter with its own clock only: a counter that stands still for `expiry_s` has lost its holder. On the
same machine a dead holder is seen at once.

Locks save work, they do not guard data. Two writers that both believe they hold a block still end in one valid
block: files are published whole, checked before they are marked, and checked again where a lock was lost
meanwhile (`block_writer`).
"""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from evl_cache.errors import CacheError
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import disk_error, names_in, remove_leftover
from evl_cache.store.disk.lock_files import (
    ASIDE_NAME,
    COUNTER_DIGITS,
    GONE,
    LOCK_NAME,
    SUFFIX,
    aside_name,
    check_readable,
    is_of,
    machine_id,
    open_lock,
    process_start,
    put_back,
    read_lock,
    take_name,
)
from evl_cache.store.disk.runtime import REAL, Runtime

BEAT_S = 5.0
EXPIRY_S = 60.0
_BEATS_PER_EXPIRY = 8
_LEAST_LOOKS = 4  # at a lock that stands still, before it is taken over
_LEAST_POLL_S, _LONGEST_POLL_S = 0.1, 1.0


@dataclass(frozen=True)
class _Holder:
    host: str  # for people; `machine` and the process's start tell whether it lives
    machine: str
    pid: int
    start: str
    token: str  # two locks of one process differ: an old observation must not count against a new lock


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """Who has a lock.

    Attributes:
        host, pid: of the process, for people; `?` and 0 where the lock cannot be read.
        is_alive: whether it lives; None where only its counter tells, as it is of another machine.
        content: all that the lock says; changes while the holder lives.
    """

    host: str
    pid: int
    is_alive: bool | None
    content: bytes


@dataclass(frozen=True)
class _Sighting:
    content: bytes
    looked_s: float  # by this process's clock
    still_s: float  # how long the counter has been seen to stand still


class BlockLock:
    """A lock this process holds. Release it, or leave the `with` block.

    Args:
        path: the lock's name.
        descriptor: its file, opened by that name: NFS, and some FUSE disks, keep an open file that loses the name it
            was opened by under another one.
        token: what tells it from every other lock.
        took_over: whether the lock of a job that died, or stood still, was in its place: that job may have left files.

    Attributes:
        path, took_over: as given.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        token: bytes,
        *,
        beat_s: float,
        runtime: Runtime = REAL,
        took_over: bool = False,
    ) -> None:
        self.path, self.took_over = path, took_over
        self._descriptor = descriptor
        self._token = token
        self._counter = 0
        self._is_released = False
        self._stop_beats = runtime.repeat(self._beat, every_s=beat_s, name=f"lock {path.stem}")

    def is_held(self) -> bool:
        """Return whether the name still leads to this process's file: a paused holder may have lost it.

        The file is opened anew: NFS remembers names and attributes for seconds, and asks its server at each open.
        Raises: CacheError where the disk refuses.
        """
        return is_of(self._token, self.path)

    def check(self) -> None:
        """Check that it is held. Raises: CacheError."""
        if not self.is_held():
            raise CacheError(f"{self.path} was taken over by another job; run the same command again")

    def may_explain(self, error: CacheError) -> bool:
        """Whether another job may have caused an error: it took this lock over, or what is staged here for a leftover."""
        return not self.is_held() or isinstance(error.__cause__, FileNotFoundError)

    def release(self) -> None:
        """Give the block back. Safe to call twice."""
        if self._is_released:
            return
        self._is_released = True
        try:
            self._stop_beats()
            self._give_back()
        except BaseException:  # a signal on the way: nobody comes back for it
            self._give_back()
            raise

    def _give_back(self) -> None:
        try:
            is_held = self.is_held()
        except CacheError:
            is_held = False  # it is not known whose it is: its time runs out
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if is_held:
            remove_leftover(self.path)

    def _beat(self) -> None:
        self._counter += 1
        with contextlib.suppress(OSError):  # at worst the lock is taken over, which `is_held` tells
            # In place, through the open file: after a takeover this writes to a file without a name.
            os.pwrite(self._descriptor, f"{self._counter:0{COUNTER_DIGITS}d}".encode(), 0)
            os.fsync(self._descriptor)  # NFS keeps writes to itself for longer than a lock lives

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class LockWatcher:
    """Takes block locks, and remembers for how long those of others have stood still.

    Args:
        directory: where lock files lie; created.
        expiry_s: a holder whose counter stands still for so long (by this process's clock) has lost its lock.
        beat_s: how often this process's locks count up; often enough for jobs of equal `expiry_s` by default.
    """

    def __init__(
        self,
        directory: Path,
        *,
        expiry_s: float = EXPIRY_S,
        beat_s: float | None = None,
        runtime: Runtime = REAL,
    ) -> None:
        self._runtime = runtime
        self.directory = directory
        self.expiry_s = expiry_s
        self.beat_s = min(BEAT_S, expiry_s / _BEATS_PER_EXPIRY) if beat_s is None else beat_s
        self._seen: dict[str, _Sighting] = {}
        make_directories(directory)

    def take(self, block: int) -> BlockLock | None:
        """Return the block's lock, or None where another job that may live holds it.

        Raises: CacheError where the disk refuses.
        """
        return self._take(self.directory / f"{block:06d}{SUFFIX}")

    def take_named(self, name: str) -> BlockLock | None:
        """Return the lock of something that is no block, as `take` does."""
        return self._take(self.directory / f"{name}{SUFFIX}")

    def wait_for(self, name: str, *, on_look: Callable[[], None] = lambda: None) -> BlockLock:
        """Return the lock of something, once no other job holds it. Errors as `take`.

        `on_look`: called before each look; what it raises ends the waiting.
        """
        wait_s, longest_s = _LEAST_POLL_S, min(_LONGEST_POLL_S, self.expiry_s / _BEATS_PER_EXPIRY)
        on_look()
        while (lock := self._take(self.directory / f"{name}{SUFFIX}")) is None:
            self._runtime.sleep(wait_s)
            on_look()
            # Longer each time: many jobs end at once, and should not lay siege to the disk.
            wait_s = max(_LEAST_POLL_S, min(1.5 * wait_s, longest_s))
        return lock

    def sweep(self, *, own: BlockLock, clean: Callable[[int], None]) -> bool:
        """Remove what dead holders left here.

        Args:
            own: the lock under which this is done; it stays.
            clean: called with each block whose holder died, while the block is locked.

        Returns: whether no other job may be at work.
        """
        is_idle = True
        for entry in [self.directory / name for name in sorted(names_in(self.directory))]:
            if ASIDE_NAME.fullmatch(entry.name):
                remove_leftover(entry)  # left by a taker that died; a living one tries again
            elif LOCK_NAME.fullmatch(entry.name) and entry != own.path:
                lock = self._take(entry)
                is_idle = is_idle and lock is not None
                if lock is not None:
                    with lock:
                        if entry.stem.isdecimal():
                            clean(int(entry.stem))
        return is_idle

    def _take(self, path: Path) -> BlockLock | None:
        content = read_lock(path)
        if content is not None:  # looked at before creating: most locks that are there are held
            if not self._is_abandoned(path, content):
                return None
            self._remove_abandoned(path)
        lock = self._create(path, took_over=content is not None)
        if lock is None and content is None:
            check_readable(path, pause=lambda: self._runtime.sleep(_LEAST_POLL_S))
        return lock

    def _create(self, path: Path, *, took_over: bool) -> BlockLock | None:
        pid = os.getpid()
        holder = _Holder(
            host=socket.gethostname(),
            machine=machine_id(),
            pid=pid,
            start=process_start(pid),
            token=secrets.token_hex(8),
        )
        token = holder.token.encode()
        descriptor: int | None = None
        try:
            if not take_name(path, b"0" * COUNTER_DIGITS + json.dumps(asdict(holder)).encode()):
                return None
            if (descriptor := open_lock(path, token)) is None:
                return None
            beat_s, runtime = self.beat_s, self._runtime
            return BlockLock(path, descriptor, token, beat_s=beat_s, runtime=runtime, took_over=took_over)
        except OSError as error:
            raise disk_error("lock", path, error) from error
        except BaseException as error:  # a signal, or it does not beat: nobody would give it back
            with contextlib.suppress(OSError, CacheError):
                is_still = isinstance(error, CacheError)  # after a signal it may be beating
                if descriptor is not None and is_still:
                    os.close(descriptor)
                if is_of(token, path):
                    path.unlink()
            raise

    def _is_abandoned(self, path: Path, content: bytes) -> bool:
        now, before = self._runtime.now_s(), self._seen.get(path.name)
        still_s = 0.0
        if before is not None and before.content == content:
            # One long gap counts little: this process may have been paused together with the holder.
            still_s = before.still_s + min(now - before.looked_s, self.expiry_s / _LEAST_LOOKS)
        self._seen[path.name] = _Sighting(content, now, still_s)
        return still_s >= self.expiry_s or _holder_is_dead(content)

    def _remove_abandoned(self, path: Path) -> None:
        """Remove exactly the file that was watched: a new holder's may have come in its place."""
        observed = self._seen.pop(path.name).content
        aside = aside_name(path)
        try:
            os.rename(path, aside)
        except OSError as error:
            if error.errno in GONE:
                return
            raise disk_error("take over", path, error) from error
        if read_lock(aside) != observed:
            # It lives: put it back, unless a third job took the name: the displaced one notices by is_held.
            put_back(aside, path)
        remove_leftover(aside)


def lock_holders(directory: Path) -> dict[int, str]:
    """Return the host that has each block's lock, alive or not; `?` for a lock that cannot be read.

    Raises: CacheError where the disk refuses.
    """
    found = {}
    for path in [directory / name for name in sorted(names_in(directory))]:
        content = read_lock(path) if LOCK_NAME.fullmatch(path.name) else None
        if path.stem.isdecimal() and content is not None:
            holder = _parse(content)
            found[int(path.stem)] = "?" if holder is None else holder.host
    return found


def lock_holder(directory: Path, name: str) -> LockHolder | None:
    """Return who has the lock of something that is no block; None where there is no such lock."""
    content = read_lock(directory / f"{name}{SUFFIX}")
    if content is None:
        return None
    holder = _parse(content)
    if holder is None:
        return LockHolder(host="?", pid=0, is_alive=None, content=content)
    is_here = holder.machine == machine_id()
    is_alive = not _holder_is_dead(content) if is_here else None
    return LockHolder(host=holder.host, pid=holder.pid, is_alive=is_alive, content=content)


def _parse(content: bytes) -> _Holder | None:
    """Return who holds a lock; None where it is unreadable."""
    try:
        return _Holder(**json.loads(content[COUNTER_DIGITS:]))
    except (ValueError, TypeError):
        return None


def _holder_is_dead(content: bytes) -> bool:
    holder = _parse(content)
    if holder is None:
        return False  # only time tells
    return holder.machine == machine_id() and process_start(holder.pid) != holder.start
