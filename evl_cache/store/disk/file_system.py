"""The kernel's side of a file: opening no link, what kind of disk it is on, writing back, what an error means."""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from evl_cache.errors import CacheError

Found = TypeVar("Found")

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
_MAPPED_FROM_NBYTES = 1 << 20  # a smaller file is read: a map holds a descriptor
_MOUNTS = Path("/proc/self/mounts")
_SYNC_FILE_RANGE_WRITE = 2  # of Linux's fcntl.h


class NoHardLinks(OSError):
    """The file system gives no file a second name: FAT, exFAT, some FUSE and SMB mounts."""


# EXDEV: some unions of disks answer so within one directory.
_NO_HARD_LINKS = {
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
}


@lru_cache(maxsize=256)
def is_local(directory: Path) -> bool:
    """Whether a directory is on a local disk; False where that cannot be told."""
    try:
        lines = _MOUNTS.read_bytes().split(b"\n")
        resolved = directory.resolve(strict=True)
    except OSError:
        return False
    kinds: dict[Path, str] = {}
    for line in filter(None, lines):
        _, mount, kind, *_ = line.split(b" ")
        kinds[_mount_point(mount)] = os.fsdecode(kind)  # a later mount hides an earlier one
    nearest = next((place for place in (resolved, *resolved.parents) if place in kinds), None)
    return nearest is not None and kinds[nearest] in _LOCAL


def _mount_point(written: bytes) -> Path:
    """The path of a mount as the kernel writes it: white space and backslashes in octal, all other bytes as they are."""
    plain = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), written)
    return Path(os.fsdecode(plain))


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


def give_second_name(path: Path, name: Path) -> None:
    """Give a file a second name in its directory, never replacing what has it.

    Raises: FileExistsError where another file has it; NoHardLinks; OSError as linking does.
    """
    try:
        os.link(path, name)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and the repeat finds our own link there.
        if not os.path.samefile(path, name):
            raise
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise NoHardLinks(error.errno, error.strerror) from error
        raise


def remove_leftover(path: Path) -> None:
    """Remove a file that nobody needs; what cannot be removed does no harm and stays.

    Close it first: NFS keeps a file that is open under a name `.nfs…`, which nobody can remove before it is closed.
    """
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def again_if_stale(read: Callable[[], Found]) -> Found:
    """Return what `read` returns, which opens a file and reads it; once more where it is gone meanwhile.

    NFS says ESTALE of an open file that another machine removed or replaced; its name may lead to the next one.
    """
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return read()


def is_there(path: Path, *, follow_links: bool = True) -> bool:
    """Whether something lies at a path, or where it leads. Raises: CacheError where the disk refuses to tell."""
    try:
        path.stat(follow_symlinks=follow_links)
    except OSError as error:
        if is_refusal(error):
            raise disk_error("look at", path, error) from error
        return False
    return True


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory; none where there is no such directory. Raises: CacheError where the disk refuses."""
    try:
        return again_if_stale(lambda: os.listdir(directory))
    except OSError as error:
        if is_refusal(error):
            raise disk_error("list", directory, error) from error
        return []


def remove_file(path: Path) -> None:
    """Remove a file that may be gone already. Raises: CacheError where the disk refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error("remove", path, error) from error


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


def has_inode(path: Path, inode: int) -> bool:
    """Whether a path leads to the file of an inode, as far as the disk tells."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino == inode
    return False


def is_empty(path: Path) -> bool:
    """Whether a file is empty by now, as a placeholder is. Read, since its size may be remembered from before."""

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read(1)

    return again_if_stale(read) == b""


def read_limited(path: Path, most_nbytes: int) -> bytes:
    """Return a regular file's bytes.

    Raises: OSError where there is none; CacheError where it is something else, or larger, or the disk refuses: what
        cannot be read for now is not taken for missing or damaged.
    """

    def read() -> tuple[int, bytes]:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most_nbytes:
                return size, b""
            # Memory is taken before anything is read, so for what is there; which may be more than its size says.
            content = file.read(size + 1)
            return size, content + file.read(most_nbytes) if len(content) > size else content

    try:
        size, content = again_if_stale(read)
    except OSError as error:
        if is_refusal(error):
            raise disk_error("read", path, error) from error
        raise
    if size > most_nbytes or len(content) > most_nbytes:
        raise CacheError(
            f"{path}: has {size} bytes, expected at most {most_nbytes}; it is no file of a cache"
        )
    return content


def map_limited(path: Path, most_nbytes: int) -> bytes | mmap.mmap:
    """Return a regular file's bytes: those of a large file on a local disk mapped, which processes then share.

    Raises: as `read_limited`.
    """
    if is_local(path.parent):
        with contextlib.suppress(OSError), open_regular(path) as file:  # what fails here fails below, too
            if _MAPPED_FROM_NBYTES <= os.fstat(file.fileno()).st_size <= most_nbytes:
                return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return read_limited(path, most_nbytes)


def files_below(root: Path, directory: str = "") -> Iterator[tuple[str, int]]:
    """Yield the name, relative to `root`, and the size of every file below a directory of it; as `entries_below`."""
    for name, entry in entries_below(root, directory):
        with contextlib.suppress(OSError):
            yield name, entry.stat(follow_symlinks=False).st_size


def entries_below(root: Path, directory: str = "") -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Yield the name, relative to `root`, of every file below a directory of it, without a look at the file.

    Links are files, and are not followed. Other jobs may be at work: what vanishes during the look, or cannot be looked
    at, is left out.
    """
    waiting = [directory]
    while waiting:
        current = waiting.pop()
        prefix = f"{current}/" if current else ""
        place = os.path.join(root, current) if current else str(root)  # faster than as a path
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(prefix + entry.name)
                    else:
                        yield prefix + entry.name, entry


def check_no_links(root: Path, path: Path) -> None:
    """Check that a path below a cache stays in it.

    Raises: CacheError where a part of it, below `root`, is a link; where the disk refuses to tell.
    """
    # By their texts, as this is asked of every file of a cache.
    top, place = "" if root == Path() else str(root), str(path)
    while place != top:
        try:
            is_link = stat.S_ISLNK(os.lstat(place).st_mode)
        except OSError as error:
            if is_refusal(error):
                raise disk_error("look at", Path(place), error) from error
            is_link = False  # there is nothing
        except ValueError:  # no name of a file
            is_link = False
        if is_link:
            raise link_error(Path(place))
        place = os.path.dirname(place)


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
    errno.ESTALE: "another machine replaced it meanwhile: run the same command again",
    errno.ENOENT: "something removed it meanwhile: run the same command again",
    errno.EMFILE: "raise the limit of open files of a process (ulimit -n)",
    errno.ENFILE: "the system has too many files open: end other processes, then run the same command again",
}


_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def is_refusal(error: OSError) -> bool:
    """Whether an error tells of a disk, a permission or a limit, and nothing of what lies at the path."""
    return error.errno not in _NOT_THERE


def disk_error(action: str, path: Path, error: OSError) -> CacheError:
    """Return what the disk refused as an error with its remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "check the disk, then run the same command again")
    return CacheError(f"cannot {action} {path}: {error.strerror or error}; {remedy}")
