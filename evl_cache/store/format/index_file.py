"""The bytes of an index file, mapped or read by calls."""

import contextlib
import mmap
import os
from pathlib import Path

from evl_cache.store.disk.file_system import disk_error, is_local, is_refusal, open_descriptor
from evl_cache.store.format.index_head import index_damaged


class IndexFile:
    """The file of an index: mapped on a local disk, so that processes share its pages; read by calls elsewhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._descriptor = open_descriptor(path)
        self.size = os.fstat(self._descriptor).st_size
        # Nobody changes the file under this name: another index comes as another file.
        is_mapped = self.size > 0 and is_local(path.parent)
        self._map = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ) if is_mapped else None

    def read(self, start: int, nbytes: int) -> bytes:
        """Return bytes of the file. Raises: CacheDamaged where it ends before; CacheError where the disk refuses."""
        found = b""
        try:
            while len(found) < nbytes:
                part = os.pread(self._descriptor, nbytes - len(found), start + len(found))
                if not part:
                    raise index_damaged(self._path, "is cut off")
                found = found + part if found else part
        except OSError as error:
            if is_refusal(error):
                raise disk_error("read", self._path, error) from error
            raise index_damaged(self._path, f"cannot be read ({error.strerror})") from error
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

    def __del__(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # of a disk that is gone
                os.close(self._descriptor)
