"""The bytes of an index file, mapped or read by calls."""

import contextlib
import errno
import mmap
import os
from pathlib import Path

from evl_cache.store.disk.file_system import disk_error, is_local, is_refusal, open_descriptor
from evl_cache.store.format.index_head import index_damaged


class IndexFile:
    """The file of an index: mapped on a local disk, so that processes share its pages; read by calls elsewhere.

    Args:
        stays_open: whether it is kept open and mapped. A large cache has hundreds of segments, and a process may open a
            thousand files: these are `release`d, and opened again for each read.
    """

    _descriptor = -1  # of an object that was never opened, too

    def __init__(self, path: Path, *, stays_open: bool = True) -> None:
        self._path = path
        self._identity = (0, 0)
        self._descriptor = open_descriptor(path)
        found = os.fstat(self._descriptor)
        self.size, self._identity = found.st_size, (found.st_dev, found.st_ino)
        # Nobody changes the file under this name: another index comes as another file.
        is_mapped = stays_open and self.size > 0 and is_local(path.parent)
        self._map = _mapped(self._descriptor, self.size) if is_mapped else None

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the file. Raises: CacheDamaged where it ends before, or is gone; CacheError where the disk refuses."""
        try:
            if self._descriptor >= 0:
                return self._read(self._descriptor, start, nbytes)
            descriptor = open_descriptor(self._path)
            try:
                return self._read(descriptor, start, nbytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            # Stale: another machine removed or replaced it, and the marks tell what it told.
            if is_refusal(error) and error.errno != errno.ESTALE:
                raise disk_error("read", self._path, error) from error
            raise index_damaged(self._path, f"cannot be read ({error.strerror})") from error

    def _read(self, descriptor: int, start: int, nbytes: int) -> bytes:
        found = b""
        while len(found) < nbytes:
            part = os.pread(descriptor, nbytes - len(found), start + len(found))
            if not part:
                raise index_damaged(self._path, "is cut off")
            found = found + part if found else part
        return found

    def view(self, start: int, nbytes: int) -> memoryview:
        """Return bytes of the file, in memory that processes share where it can be."""
        if self._map is None or os.fstat(self._descriptor).st_size < start + nbytes:
            return memoryview(self.read(start, nbytes))
        return memoryview(self._map)[start : start + nbytes]

    def check_size(self) -> None:
        """Check that nobody cut the file off, where it is mapped. Raises: CacheDamaged."""
        if self._map is not None and os.fstat(self._descriptor).st_size < self.size:
            raise index_damaged(self._path, "was cut off while it was open")

    def release(self) -> None:
        """Close the file, which is not mapped; what is read from now on opens it again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # of a disk that is gone
                found = os.fstat(descriptor)
                # By now the number may be another file's, where somebody closed all that a process had open.
                if (found.st_dev, found.st_ino) == self._identity:
                    os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def _mapped(descriptor: int, nbytes: int) -> mmap.mmap | None:
    """Return a map of a file; None where the system gives none, such as beyond a limit of memory: it is read, then."""
    with contextlib.suppress(OSError):
        return mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ)
    return None
