"""Directories that are made, and the names in them, durably."""

import contextlib
import errno
import os
from pathlib import Path

from evl_cache.store.disk.file_system import disk_error, is_there
from evl_cache.store.disk.permissions import give_directory_mode, give_file_mode

FILE_MODE = 0o644  # less the umask, which the kernel applies
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def make_directories(path: Path, *, sync: bool = True) -> bool:
    """Create `path` and its missing parents, each made durable. Several writers may do so at once.

    Args:
        sync: false where the caller syncs them all later, those that are there as well.

    Returns: whether it was missing.
    """
    missing = [path]
    while not is_there(missing[-1]) and missing[-1] != missing[-1].parent:
        missing.append(missing[-1].parent)
    is_new = False
    for directory in reversed(missing[:-1]):
        is_new = False
        try:
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                is_new = True
                give_directory_mode(directory)
        except OSError as error:
            raise disk_error("create", directory, error) from error
        if sync:
            fsync_directory(directory.parent)
    return is_new


def make_empty_file(path: Path) -> None:
    """Make a file that says something by being there, durably; one that is there stays. Raises CacheError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            give_file_mode(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error("create", path, error) from error
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the file system can. Raises CacheError where it fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise disk_error("sync", path, error) from error
