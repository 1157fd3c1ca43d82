"""The files that locks are: made whole, told from what else lies there, read as another machine left them.

A lock file holds a counter of fixed width, then who holds it, whose token no other lock has. No file is open here when it loses a
name: NFS, and some FUSE disks, keep such a file under another name, which nobody can remove before it is closed.
"""

import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from evl_cache.errors import CacheError
from evl_cache.store.disk.file_system import (
    NoHardLinks,
    again_if_stale,
    disk_error,
    give_second_name,
    remove_leftover,
)

COUNTER_DIGITS = 20
SUFFIX = ".lock"
CACHE_LOCK = "cache"  # who holds it may write what belongs to no block
# What lies among locks and is neither, such as NFS's `.nfs…`, is somebody else's.
LOCK_NAME = re.compile(rf"([0-9]{{6,}}|{CACHE_LOCK})\.lock")
ASIDE_NAME = re.compile(rf"\.{LOCK_NAME.pattern}-[0-9a-f]{{16}}")
_STALE_LOOKS = 5  # before a lock counts as unreadable
GONE = {errno.ENOENT, errno.ESTALE}  # errors of what another machine has removed


def take_name(path: Path, content: bytes) -> bool:
    """Whether `path` is now a lock with this content. Raises: OSError where the disk refuses.

    Linking shows others the whole file at once. Where there are no hard links, O_EXCL says who has the name; a file
    whose maker died before it had written into it, or half of it, is taken over by time alone.
    """
    temporary = aside_name(path)
    try:
        _write_new(temporary, content)
        try:
            give_second_name(temporary, path)
        except NoHardLinks:
            return _create_in_place(path, content)
        except (FileExistsError, FileNotFoundError):
            return False  # taken; or swept, and the caller tries again
    finally:
        remove_leftover(temporary)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    try:
        _write_new(path, content)
    except FileExistsError:
        return False
    return True


def _write_new(path: Path, content: bytes) -> None:
    """Make a file that is not there, and close it, so that every machine sees it whole. Raises: OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            if os.write(descriptor, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError:
        remove_leftover(path)
        raise


def open_lock(path: Path, token: bytes) -> int | None:
    """Return a descriptor of a lock that was just taken; None where another job has taken it over already.

    Raises: OSError or CacheError where the disk refuses. The lock is removed then, if that can be: no one would hold it.
    """
    descriptor = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        if is_of(token, path):
            return descriptor
    except (OSError, CacheError) as error:
        if not isinstance(error, OSError) or error.errno not in GONE:
            _close(descriptor)
            remove_leftover(path)
            raise
    _close(descriptor)
    return None


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(descriptor)


def aside_name(path: Path) -> Path:
    """Return a name beside a lock, for a moment; `ASIDE_NAME` knows it."""
    return path.with_name(f".{path.name}-{secrets.token_hex(8)}")


def put_back(aside: Path, path: Path) -> None:
    """Give a lock that was renamed its name again, unless another has it by now."""
    with contextlib.suppress(OSError):
        try:
            give_second_name(aside, path)
        except NoHardLinks:
            if not path.exists():
                os.rename(aside, path)


def is_of(token: bytes, path: Path) -> bool:
    """Whether a lock is that of the holder with this token. Raises: CacheError where the disk refuses."""
    try:
        return token in again_if_stale(path.read_bytes)
    except OSError as error:
        if error.errno in GONE:
            return False
        raise disk_error("read", path, error) from error


def check_readable(path: Path, *, pause: Callable[[], None]) -> None:
    """Check that a lock is gone by now, or can be read: otherwise nobody could wait for its end.

    ESTALE is what a lock answers that is replaced at this moment, and also a disk whose server has forgotten this
    machine: there it lasts. Raises: CacheError.
    """
    for looks_left in reversed(range(_STALE_LOOKS)):
        try:
            again_if_stale(path.read_bytes)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.ESTALE and looks_left:
                pause()
                continue
            raise disk_error("read", path, error) from error
        return


def read_lock(path: Path) -> bytes | None:
    """Return what a lock says; None where there is none, or it cannot be read."""
    try:
        return again_if_stale(path.read_bytes)
    except OSError:
        return None


def machine_id() -> str:
    """Return the name of this machine since its last start and of the process name space: there a pid means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}:{secrets.token_hex(4)}"  # never taken for the same machine


def process_start(pid: int) -> str:
    """Return the start of a process in clock ticks, which tells a reused pid from the old one; '' if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
