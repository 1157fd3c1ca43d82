"""The kernel's side of a file: opening no link, what kind of disk it is on, writing back, what an error means."""

import contextlib
import ctypes
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from evl_cache.errors import CacheError

# Kinds whose pages the kernel itself reads. A mapped file of any other (NFS, Lustre, FUSE, SMB, 9p, …) that is
# changed or lost elsewhere kills the process that touches it.
_LOCAL = {
    "bcachefs",
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "jfs",
    "overlay",
    "ramfs",
    "tmpfs",
    "xfs",
    "zfs",
}
_MOUNTS = Path("/proc/self/mounts")
_SYNC_FILE_RANGE_WRITE = 2  # of Linux's fcntl.h


@lru_cache(maxsize=256)
def is_local(directory: Path) -> bool:
    """Whether a directory is on a local disk; False where that cannot be told."""
    try:
        lines = _MOUNTS.read_text().splitlines()
        resolved = directory.resolve(strict=True)
    except OSError:
        return False
    kinds: dict[Path, str] = {}
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        kinds[Path(mount.encode().decode("unicode_escape"))] = kind  # a later mount hides an earlier one
    nearest = next((place for place in (resolved, *resolved.parents) if place in kinds), None)
    return nearest is not None and kinds[nearest] in _LOCAL


def start_writeback(descriptor: int, start: int, end: int) -> None:
    """Have the kernel begin to write bytes start .. end of a file to the disk, without waiting for it.

    Only a hint: durability is fsync's alone, which then finds little left to do. Where there is no such call
    (other systems than Linux), nothing happens.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, start, end - start, _SYNC_FILE_RANGE_WRITE)


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return None
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    result: Callable[[int, int, int, int], int] = function
    return result


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what tells the file under a name from any other that is published there; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file to read. Raises: as `open_descriptor`."""
    return io.FileIO(open_descriptor(path))


def open_descriptor(path: Path) -> int:
    """Open a regular file to read; never what a link leads to, a pipe or a device.

    Raises: OSError as opening does; CacheError where it is something else.
    """
    # Not blocking: a pipe would wait for a writer for ever.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise link_error(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CacheError(f"{path}: is no regular file; a cache holds plain files only")
    return descriptor


def read_limited(path: Path, most_nbytes: int) -> bytes:
    """Return a regular file's bytes. Raises: as `open_descriptor`; CacheError where it is larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most_nbytes else file.read(most_nbytes + 1)
    if size > most_nbytes or len(content) > most_nbytes:
        raise CacheError(
            f"{path}: has {size} bytes, expected at most {most_nbytes}; it is no file of a cache"
        )
    return content


def files_below(root: Path, directory: str = "") -> Iterator[tuple[str, int]]:
    """Yield the name, relative to `root`, and the size of every file below a directory of it.

    Links are files, and are not followed. Other jobs may be at work: what vanishes during the look, or cannot be looked
    at, is left out.
    """
    waiting = [directory]
    while waiting:
        current = waiting.pop()
        prefix = f"{current}/" if current else ""
        with contextlib.suppress(OSError), os.scandir(root / current) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(prefix + entry.name)
                    else:
                        yield prefix + entry.name, entry.stat(follow_symlinks=False).st_size


def check_no_links(root: Path, path: Path) -> None:
    """Check that a path below a cache stays in it. Raises: CacheError where a part of it, below `root`, is a link."""
    while path != root:
        if path.is_symlink():
            raise link_error(path)
        path = path.parent


def link_error(path: Path) -> CacheError:
    """Return the error of a link where a cache has a file or directory."""
    return CacheError(
        f"{path}: is a link; a cache holds plain files and directories only: copy what it leads to"
    )


_REMEDIES = {
    errno.ENOSPC: "free space or use another disk, then run the same command again: finished blocks stay",
    errno.EDQUOT: "free space within the quota or use another disk, then run the same command again",
    errno.EACCES: "check the permissions of the directory",
    errno.EPERM: "check the permissions of the directory",
    errno.EROFS: "the file system is read-only: use another disk",
    errno.ENOENT: "something removed it meanwhile: run the same command again",
}


def disk_error(action: str, path: Path, error: OSError) -> CacheError:
    """Return what the disk refused as an error with its remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the disk, then run the same command again")
    return CacheError(f"cannot {action} {path}: {error.strerror or error}; {remedy}")
