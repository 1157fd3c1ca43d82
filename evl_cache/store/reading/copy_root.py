"""The directory of local copies of remote caches: how much they may take, and what is removed when they take more.

`$EVL_CACHE_COPY_ROOT` (default: `evl-cache` in the user's cache directory) and `$EVL_CACHE_COPY_GB` (default: half of
what is free and what copies take there already). All copies there share the limit, and all processes the account of what
they take, which is written before bytes are and put right after. A process that died in between leaves it too high; so it is
taken anew when the limit is reached.

The directory may hold anything else, even caches and a person's own files: nothing is looked at or removed but shard
files, under their exact names, of directories that are named by a cache digest and hold the marker of a copy.
"""

import contextlib
import fcntl
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheError, UsageError
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links, disk_error, read_limited
from evl_cache.store.disk.forks import renew_in_children
from evl_cache.store.format.description import read_description
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.layout import (
    CLIPS_NAME,
    DONE_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    array_layouts,
)
from evl_cache.store.reading.staged_files import STAGED, remove_old_staged, staged_file
from evl_cache.store.shards.metadata import METADATA_NAME

ROOT_VARIABLE, LIMIT_VARIABLE = "EVL_CACHE_COPY_ROOT", "EVL_CACHE_COPY_GB"
ACCOUNT_NAME = (
    ".evl-cache-copies"  # holds the bytes that all copies take, and its lock is that of who changes them
)
_DEFAULT_SHARE = 0.5
# Who reads holds a file for a moment only, and never while it waits for room itself.
_PATIENCE_S = 5.0
_PAUSES_S = (0.001, 0.05)  # first, longest
# A process that was stopped (Ctrl-Z) must not stop the others: it is waited for once, and then hardly.
_LOCK_PATIENCE_S, _NEXT_PATIENCE_S = 10.0, 0.2
# In parts of the limit: after so much is written, what lies there is looked at again. The account may be wrong, by older
# versions that keep none, by a disk without locks, or by a person's hand.
_LOOKS_OF_LIMIT = 16
MARKER_NAME = "evl-cache-copy.json"  # only directories that hold it are copies
_MARKER = re.compile(rb'\{"cache_digest":"([0-9a-f]{64})"\}\n')
_DIGITS = 32  # of the cache digest, in the copy's name
_COPY_NAME = re.compile(f"[0-9a-f]{{{_DIGITS}}}")
_STAGED_SHARD = re.compile(r"\.tmp-[0-9]+-[0-9a-f]{16}")
_ACCOUNT_DIGITS = 20
_ACCOUNT = re.compile(rb"[0-9]{20}\n")
_FREED_SHARE = 0.1  # beyond what is needed: so that not every fetch has to remove something


_ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale", "class_tokens")
_OF_A_COPY = {
    *(MARKER_NAME, METADATA_NAME, MANIFEST_NAME, CLIPS_NAME, PROJECTIONS_NAME, DONE_NAME, INDEX_NAME),
    *_ARRAYS,
}


class CopyRoot:
    """The directory of all copies. Their shard files are removed, the least recently used first, and nothing else."""

    def __init__(self, path: Path | None = None, limit_nbytes: int | None = None) -> None:
        self.path = path or default_copy_root()
        make_directories(self.path)
        self.limit_nbytes = limit_nbytes or default_limit(
            self.path, lambda: sum(n for _, n, _ in self._files())
        )
        self._descriptor = -1
        self.renew()
        renew_in_children(self)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def renew(self) -> None:
        """Begin anew in a forked child: a lock may be held for ever, and that of the account's file is the parent's."""
        self._lock = threading.Lock()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._unseen_nbytes: float = math.inf  # written since what lies there was looked at
        self._lock_patience_s, self._waited_in_vain = _LOCK_PATIENCE_S, False

    def claim(self, cache_digest: str) -> Path:
        """Return the directory of a cache's copy, which is made and marked, or has been.

        Raises: CacheError where something else lies there, or the disk refuses.
        """
        path = self.path / cache_digest[:_DIGITS]
        check_no_links(self.path, path)
        make_directories(path)
        if _is_copy(path):
            remove_old_staged(path)
            return path
        # Copies of older versions have no marker, but nothing else either: a cache that was put here has.
        foreign = sorted(
            name for name in os.listdir(path) if name not in _OF_A_COPY and not STAGED.fullmatch(name)
        )
        if foreign:
            raise CacheError(
                f"{path}: holds {foreign[0]!r}, so it is no copy of a remote cache; move it away, or set {ROOT_VARIABLE} "
                "to an empty directory"
            )
        write_in_copy(path / MARKER_NAME, canonical_json({"cache_digest": cache_digest}))
        return path

    def kept(self, cache_digest: str) -> Path | None:
        """Return the directory of a cache's copy; None where there is none."""
        path = self.path / cache_digest[:_DIGITS]
        return path if not path.is_symlink() and _is_copy(path) else None

    @contextlib.contextmanager
    def room(
        self, nbytes: int, *, check: Callable[[], None] = lambda: None
    ) -> Iterator[Callable[[int], None]]:
        """Remove files until so many bytes more fit; while this is entered, nobody else writes or removes any.

        Files that are held stay. Where no other is left, and none is let go of in time, the bytes are over the limit.

        Args:
            check: called before each look; what it raises ends the waiting.

        Yields: what is to be called with the bytes that were written in fact. Raises: CacheError.
        """
        patience_s = _NEXT_PATIENCE_S if self._waited_in_vain else _PATIENCE_S
        until, pause = time.monotonic() + patience_s, _PAUSES_S[0]
        while True:
            with self._alone(check):
                taken, is_all = self._taken_beside(nbytes)
                has_room = taken + nbytes <= self.limit_nbytes or is_all
                if has_room or time.monotonic() > until:
                    self._waited_in_vain = not has_room
                    self._note(taken + nbytes)
                    yield partial(self._note_written, taken)
                    return
                self._note(taken)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES_S[1])

    def _taken_beside(self, nbytes: int) -> tuple[int, bool]:
        """Return what copies take when files were removed so that `nbytes` fit, and whether no other could be."""
        noted = self._noted()
        is_seen = self._unseen_nbytes <= self.limit_nbytes // _LOOKS_OF_LIMIT
        if noted is not None and is_seen and noted + nbytes <= self.limit_nbytes:
            return noted, True
        self._unseen_nbytes = 0
        files = sorted(self._files())
        taken = sum(size for _, size, _ in files)
        is_all = True
        if taken + nbytes > self.limit_nbytes:
            free = taken + nbytes - int(self.limit_nbytes * (1 - _FREED_SHARE))
            for _, size, path in files:
                if free <= 0:
                    break
                with contextlib.suppress(OSError, CacheError):  # gone meanwhile; a link was put there
                    check_no_links(self.path, path)
                    if _remove_unless_held(path):
                        free, taken = free - size, taken - size
                    else:
                        is_all = False
        return taken, is_all

    @contextlib.contextmanager
    def _alone(self, check: Callable[[], None]) -> Iterator[None]:
        """Keep other threads and processes from the account, and from files' coming and going."""
        with self._lock:
            is_locked = self._lock_account(check)
            try:
                yield
            finally:
                if is_locked:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _lock_account(self, check: Callable[[], None]) -> bool:
        """Lock the account, opened where it is not, or is none any more; return whether it is locked."""
        if self._descriptor >= 0 and not os.fstat(self._descriptor).st_nlink:
            os.close(self._descriptor)  # removed: others make, and lock, another one
            self._descriptor = -1
        if self._descriptor < 0:
            self._descriptor = self._open_account()
        is_locked = _locked(self._descriptor, self._lock_patience_s, check)
        self._lock_patience_s = _LOCK_PATIENCE_S if is_locked else _NEXT_PATIENCE_S
        return is_locked

    def _open_account(self) -> int:
        make_directories(self.path)
        try:
            place = self.path / ACCOUNT_NAME
            return os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise self._no_account(error) from error

    def _no_account(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot write {self.path / ACCOUNT_NAME}: {error.strerror}; free space, or set {ROOT_VARIABLE} to an empty "
            "directory on another disk, or to one of your own"
        )

    def _noted(self) -> int | None:
        try:
            written = os.pread(self._descriptor, _ACCOUNT_DIGITS + 1, 0)
        except OSError as error:
            raise self._no_account(error) from error
        return int(written) if _ACCOUNT.fullmatch(written) else None

    def _note_written(self, before: int, written: int) -> None:
        self._unseen_nbytes += written
        self._note(before + written)

    def _note(self, nbytes: int) -> None:
        try:
            os.pwrite(self._descriptor, b"%0*d\n" % (_ACCOUNT_DIGITS, max(0, nbytes)), 0)
        except OSError as error:
            raise self._no_account(error) from error

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (last use, bytes on the disk, path) of every shard file of every copy."""
        with os.scandir(self.path) as entries:
            copies = [
                Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and _is_copy(Path(e.path))
            ]
        for path in (path for copy in copies for path in _shard_files(copy)):
            with contextlib.suppress(OSError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield found.st_mtime, found.st_blocks * 512, path


def _remove_unless_held(path: Path) -> bool:
    """Remove a shard file, and give back what it takes, whoever has it open; return whether nobody held it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a disk without such locks: who reads it keeps its bytes until the file is closed
            path.unlink()
            return True
        path.unlink()
        if os.fstat(descriptor).st_nlink == 0:  # else it has a name somewhere else, where it must stay whole
            os.ftruncate(descriptor, 0)
        return True
    finally:
        os.close(descriptor)


def _locked(descriptor: int, patience_s: float, check: Callable[[], None]) -> bool:
    """Lock a file, or go on without after a while, or where the disk has no such locks; return whether it is locked.

    Two who write at once can spoil each other's chunks, which is noticed when they are read.
    """
    until, pause = time.monotonic() + patience_s, _PAUSES_S[0]
    while True:
        check()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        except OSError:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES_S[1])


def write_in_copy(path: Path, content: bytes) -> None:
    """Write a small file of a copy, whole or not at all; several processes may do so at once. Raises: CacheError."""
    try:
        with staged_file(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise disk_error("write", path, error) from error


def _is_copy(path: Path) -> bool:
    """Whether a directory is a copy that this package made: by its name, and by the marker in it."""
    if not _COPY_NAME.fullmatch(path.name):
        return False
    with contextlib.suppress(OSError, CacheError):
        marker = _MARKER.fullmatch(read_limited(path / MARKER_NAME, 1000))
        return marker is not None and marker[1].decode().startswith(path.name)
    return False


def _shard_files(copy: Path) -> Iterator[Path]:
    """Yield the paths of a copy's shard files, and of those on their way, by the names that its description gives."""
    with contextlib.suppress(CacheError):
        spec = read_description(copy).spec
        for layout in array_layouts(spec).values():
            with contextlib.suppress(OSError, CacheError):
                check_no_links(copy, layout.blocks_directory(copy))
                shards = {layout.shard(copy, b) for b in layout.blocks_there(copy) if b < spec.num_blocks}
                for directory in {layout.shard(copy, 0).parent, *(shard.parent for shard in shards)}:
                    with contextlib.suppress(OSError):  # of the first block there may be none
                        for path in (directory / name for name in os.listdir(directory)):
                            if path in shards or _STAGED_SHARD.fullmatch(path.name):
                                yield path


def default_copy_root() -> Path:
    """Return where copies lie, as the environment says. Raises: UsageError where it does not, and there is no home directory."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "evl-cache"
    try:
        return Path.home() / ".cache" / "evl-cache"
    except RuntimeError as error:
        raise UsageError(
            f"this user has no home directory for copies of remote caches; set {ROOT_VARIABLE} to a directory for them, or HOME"
        ) from error


def default_limit(path: Path, taken: Callable[[], int]) -> int:
    """Return the bytes that copies may take, as the environment says. Raises: UsageError where it says no number.

    Args:
        taken: gives what copies take there already, which counts as free: else the limit would shrink by its own copies.
    """
    named = os.environ.get(LIMIT_VARIABLE)
    if not named:
        return max(1, int((shutil.disk_usage(path).free + taken()) * _DEFAULT_SHARE))
    try:
        limit = int(float(named) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit < 1:
        raise UsageError(f"{LIMIT_VARIABLE} is {named!r}; expected gigabytes, such as 200")
    return limit
