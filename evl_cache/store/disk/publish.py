"""Atomic publication of files on a POSIX file system: whole and durable under its name, or not there at all.

A file is written under a staging name in the directory where it will live, synced, and only then given its
name. Published files are never replaced, except by `publish_replacing`, so what a reader has seen stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from evl_cache.errors import CacheError, UsageError
from evl_cache.store.disk.checksum import content_digest, file_digest, longer_crc32c
from evl_cache.store.disk.directories import FILE_MODE, fsync_directory
from evl_cache.store.disk.file_system import (
    NoHardLinks,
    disk_error,
    give_second_name,
    has_inode,
    is_empty,
    is_there,
    remove_leftover,
    start_writeback,
)
from evl_cache.store.disk.permissions import give_file_mode

# No host's name has a dot here, so that no other staged file is taken for one of a block.
_STAGING_NAME = re.compile(r"\.tmp-(?:b([0-9]{6,12})\.)?[A-Za-z0-9_-]{1,40}-[0-9]+-[0-9a-f]{16}")
_PLACEHOLDER_WAIT_S = 2.0
# Written at a time, at multiples of it: the page cache then holds the file in pages of this size, which are copied
# a tenth faster than small ones and mapped by one entry each.
_HUGE_PAGE_NBYTES = 2 << 20
# What is smaller is gathered, so that a page is of few pieces: a call takes at most 1024.
_SMALL_NBYTES = 1 << 14
_WRITEBACK_NBYTES = 8 << 20  # handed to the disk at a time, so that the sync at the end has little left


class AlreadyPublished(CacheError):
    """The name is taken. Nothing was changed; the caller may compare what lies there with what it has."""


def is_staging_name(name: str) -> bool:
    """Whether `name` (no directory) is that of a staged file: a leftover, once its writer is dead."""
    return _STAGING_NAME.fullmatch(name) is not None


def staged_block(name: str) -> int | None:
    """Return the block that a staged file's name tells; None where it tells none, or is no staged file's."""
    found = _STAGING_NAME.fullmatch(name)
    return None if found is None or found[1] is None else int(found[1])


def stage_file(directory: Path, *, block: int | None = None) -> StagedFile:
    """Open a new staged file in `directory`. A context manager: what is not published is removed.

    `block`: told by its name, so that whoever finds it knows whose lock tells that its writer is dead.

    Raises CacheError where the directory cannot be written.
    """
    return StagedFile(directory, block=block)


class StagedFile:
    """A file being written under a staging name.

    Attributes:
        path: the staging name.
        size: bytes written so far.
        crc32c: checksum of the bytes written so far.
    """

    def __init__(self, directory: Path, *, block: int | None = None) -> None:
        self.path = _staging_path(Path(directory), block)
        self.size = self.crc32c = 0
        self._pending: list[bytes | bytearray | memoryview] = []  # of the last huge page, not written yet
        self._written = 0  # bytes that the kernel has
        self._handed_on = 0  # and of these, those on their way to the disk
        self._hash = hashlib.sha256()
        self._descriptor: int | None = None
        self._staged = False
        self._inode = 0  # once sealed
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, FILE_MODE)
            self._staged = True
            give_file_mode(self._descriptor)
        except OSError as error:
            self.discard()
            raise disk_error("create", self.path, error) from error
        except BaseException:  # a signal that became an exception
            self._staged = True
            self.discard()
            raise

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the bytes written so far."""
        return self._hash.hexdigest()

    def write(self, data: bytes | bytearray | memoryview, *, checksum: int | None = None) -> None:
        """Append all of `data`, by huge pages. Raises CacheError (disk full, ...), which names the remedy.

        `checksum` is the CRC-32C of `data`, where it is known.
        """
        if self._descriptor is None:
            raise UsageError(f"{self.path} is closed: write before publishing")
        # Bytes are not copied, they wait as they are. What could change before it is written is copied.
        left = memoryview(data if isinstance(data, bytes) else bytes(data))
        self._hash.update(left)
        self.crc32c = longer_crc32c(self.crc32c, left, checksum)
        while len(left) > 0:
            part = left[: self._written + _HUGE_PAGE_NBYTES - self.size]
            self._wait_with(part)
            self.size += len(part)
            left = left[len(part) :]
            if self.size - self._written == _HUGE_PAGE_NBYTES:
                self._flush(self._descriptor)

    def write_over(self, data: bytes) -> None:
        """Write over the first bytes of the file. `sha256` and `crc32c` tell nothing of it from then on.

        Raises: as `write`.
        """
        if self._descriptor is None:
            raise UsageError(f"{self.path} is closed: write before publishing")
        self._flush(self._descriptor)
        with self._discarded_on_error("write", self.path):
            at = 0
            while at < len(data):
                at += os.pwrite(self._descriptor, data[at:], at)

    def _wait_with(self, part: memoryview) -> None:
        if len(part) >= _SMALL_NBYTES:
            self._pending.append(part)
            return
        last = self._pending[-1] if self._pending else None
        if not isinstance(last, bytearray):
            last = bytearray()
            self._pending.append(last)
        last += part

    def _flush(self, descriptor: int) -> None:
        """Give the kernel what is pending, in one call: it makes one large page of it."""
        pending = [memoryview(part) for part in self._pending]
        self._pending = []
        with self._discarded_on_error("write", self.path):
            while pending:
                count = os.writev(descriptor, pending)
                while pending and count >= len(pending[0]):
                    count -= len(pending.pop(0))
                if count:
                    pending[0] = pending[0][count:]
        self._written = self.size
        if self._written - self._handed_on >= _WRITEBACK_NBYTES:
            start_writeback(descriptor, self._handed_on, self._written)
            self._handed_on = self._written

    def seal(self) -> None:
        """End the file and make its bytes durable, which publishing does where it was not done before."""
        if self._descriptor is None:
            if self._staged:
                return
            raise UsageError(f"{self.path} is closed: stage a new file")
        self._flush(self._descriptor)
        with self._discarded_on_error("sync", self.path):
            os.fsync(self._descriptor)
            self._inode = os.fstat(self._descriptor).st_ino
            self._close()

    def publish(self, final: Path, *, sync_directory: bool = True, is_locked: bool = False) -> None:
        """Give the file the name `final` (same directory), durably, never replacing what exists.

        Where there are no hard links, a rename would replace what exists. O_EXCL on an empty placeholder under the
        final name then decides who may rename. A writer that died between the two steps leaves the placeholder; no
        file of ours is empty, so one that stays empty for a while, by this machine's own clock, is taken over. Only a
        writer stalled that long exactly there could replace a file, and blocks are checked before they are marked.
        Where `is_locked`, the caller had a lock under which alone this name is given when the file was staged, and
        whoever took that over meanwhile removed the file: there is no placeholder, and a kill leaves none.

        Where `sync_directory` is false, the caller syncs the directory: only then is the name durable.
        Raises AlreadyPublished where the name is taken, CacheError where the file system refuses.
        """
        self._check_directory(final)
        self.seal()
        with self._discarded_on_error("publish", final):
            self._take_name(final, is_locked=is_locked)
            self._remove()
        if sync_directory:
            fsync_directory(final.parent)

    def publish_replacing(self, final: Path, *, sync_directory: bool = True) -> None:
        """Give the file the name `final` (same directory), in place of what may exist there. Otherwise as `publish`."""
        self._check_directory(final)
        self.seal()
        with self._discarded_on_error("publish", final):
            try:
                os.replace(self.path, final)
            except FileNotFoundError:
                # NFS repeats a request whose answer was lost, and the repeat finds nothing left to rename.
                if not has_inode(final, self._inode):
                    raise
            self._staged = False
        if sync_directory:
            fsync_directory(final.parent)

    def discard(self) -> None:
        """Close and remove the staged file; no effect once published."""
        with contextlib.suppress(OSError):  # the first error is the one to show
            self._close()
        self._remove()

    def _check_directory(self, final: Path) -> None:
        if final.parent != self.path.parent:
            raise UsageError(f"cannot publish {self.path} as {final}: stage in the same directory")

    @contextlib.contextmanager
    def _discarded_on_error(self, action: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise disk_error(action, path, error) from error

    def _take_name(self, final: Path, *, is_locked: bool) -> None:
        try:
            give_second_name(self.path, final)
        except FileExistsError:
            self._refuse(final)
        except NoHardLinks:
            if is_locked:
                if is_there(final):
                    self._refuse(final)
            elif not _made_placeholder(final) and not _stays_empty(final):
                self._refuse(final)
            self._rename(final)

    def _rename(self, final: Path) -> None:
        try:
            os.rename(self.path, final)
        except OSError as error:
            # NFS repeats a request whose answer was lost, and the repeat finds nothing left to rename.
            if not isinstance(error, FileNotFoundError) or not has_inode(final, self._inode):
                with contextlib.suppress(OSError):
                    if is_empty(final):
                        remove_leftover(final)
                raise
        self._staged = False

    def _refuse(self, final: Path) -> None:
        self.discard()
        # Its writer may have died before this: whoever accepts the file as it is needs it durable too.
        fsync_directory(final.parent)
        raise AlreadyPublished(f"{final} exists already and is not replaced; verify or repair the cache")

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        self._pending = []
        if descriptor is not None:
            os.close(descriptor)

    def _remove(self) -> None:
        if self._staged:
            self._staged = False
            remove_leftover(self.path)  # closed by now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_atomic(
    path: Path, content: bytes, *, replace: bool = True, before_naming: Callable[[], None] | None = None
) -> bool:
    """Publish bytes under a name, in place of what may exist there unless `replace` is false.

    `before_naming` checks, once the file is staged, that the caller has a lock still; for that `publish` has `is_locked`.

    Returns: whether they were written; False where the same bytes were there and were not to be replaced.
    Raises: AlreadyPublished where other bytes are there and `replace` is false; CacheError as `StagedFile`.
    """
    with stage_file(path.parent) as staged:
        staged.write(content)
        if before_naming is not None:
            staged.seal()
            before_naming()
        if replace:
            staged.publish_replacing(path)
            return True
        try:
            staged.publish(path, is_locked=before_naming is not None)
        except AlreadyPublished:
            if file_digest(path) != content_digest(content):
                raise
            return False
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a staging name that anything may write a file to; at the end it is published in place of what is at `path`.

    For files that are no cache's: their permissions are those of the umask. An error leaves what was there. Raises:
    OSError where the file system refuses.
    """
    staging = _staging_path(path.parent)
    try:
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _staging_path(directory: Path, block: int | None = None) -> Path:
    of_block = "" if block is None else f"b{block:06d}."
    host = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:40] or "host"
    return directory / f".tmp-{of_block}{host}-{os.getpid()}-{secrets.token_hex(8)}"


def _made_placeholder(path: Path) -> bool:
    """Whether an empty file was made at a path; False where something is there."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
    except FileExistsError:
        return False
    return True


def _stays_empty(path: Path) -> bool:
    deadline = time.monotonic() + _PLACEHOLDER_WAIT_S
    while time.monotonic() < deadline:
        if not is_empty(path):
            return False
        time.sleep(0.01)
    return is_empty(path)
