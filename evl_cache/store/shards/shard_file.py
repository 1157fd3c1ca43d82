"""The file that a shard's bytes come from. A shard that lies elsewhere than on a disk is another `ShardFile`."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evl_cache.errors import CacheDamaged
from evl_cache.store.disk.file_system import open_descriptor

Bytes = NDArray[np.uint8]


class ShardFile(Protocol):
    """An open shard, in the process that opened it; threads may share it. Closed when its last user lets go."""

    mapped: Bytes | None
    """The file's bytes where they can be looked at without a call; `check_size` (below) before every look."""

    def size_now(self) -> int:
        """Return the bytes that the file has now."""

    def read(self, buffers: Sequence[Bytes], offset: int) -> None:
        """Fill buffers one after another from `offset`. Raises: CacheDamaged where the file ends or fails."""

    def will_need(self, start: int, stop: int) -> None:
        """Hint that these bytes will be asked for soon."""


class LocalFile:
    """A file of this computer, mapped or read by calls. See `ShardFile`.

    Args:
        path: where the file lies.
        map_file: map it; for local disks only, see `file_system`.
        descriptor: the file, where it is open already; it is looked at through a descriptor of its own.

    Raises: OSError where it cannot be opened; CacheError where it is a link, a pipe or a device.
    """

    def __init__(self, path: Path, *, map_file: bool = False, descriptor: int | None = None) -> None:
        self._pages: mmap.mmap | None = None
        self.mapped: Bytes | None = None
        self._descriptor: int | None = open_descriptor(path) if descriptor is None else os.dup(descriptor)
        if map_file and self.size_now() > 0:
            with contextlib.suppress(OSError):  # a disk that maps no files: they are read by calls
                self._pages = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        if self._pages is not None:
            self.mapped = np.frombuffer(self._pages, np.uint8)
            self._close()  # the map keeps a descriptor of its own

    def size_now(self) -> int:
        """See `ShardFile`."""
        if self._pages is not None:
            return self._pages.size()  # of the file, not of the map
        assert self._descriptor is not None
        return os.fstat(self._descriptor).st_size

    def read(self, buffers: Sequence[Bytes], offset: int) -> None:
        """See `ShardFile`."""
        if self.mapped is None:
            assert self._descriptor is not None
            _read_fully(self._descriptor, list(buffers), offset)
            return
        check_size(self)
        for buffer in buffers:
            np.copyto(buffer, self.mapped[offset : offset + len(buffer)])
            offset += len(buffer)

    def will_need(self, start: int, stop: int) -> None:
        """See `ShardFile`."""
        if self._pages is not None:
            start -= start % mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_WILLNEED, start, stop - start)
        elif hasattr(os, "posix_fadvise") and self._descriptor is not None:  # not on macOS
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(
                OSError
            ):  # it was only read: a disk that is gone by now takes nothing along
                os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # not where opening failed
            self._close()


def check_size(file: ShardFile) -> None:
    """Check the size of a mapped file: one that was cut short kills whoever touches it. Raises: CacheDamaged."""
    if file.mapped is not None and (size := file.size_now()) != len(file.mapped):
        raise CacheDamaged(f"changed its size from {len(file.mapped)} to {size} bytes")


def _read_fully(descriptor: int, buffers: list[Bytes], offset: int) -> None:
    while buffers:
        try:
            count = os.preadv(descriptor, [buffer.data for buffer in buffers], offset)
        except OSError as error:
            raise CacheDamaged(f"cannot be read: {error.strerror}") from error
        if count == 0:
            raise CacheDamaged(f"is cut off: the file ends at byte {offset}")
        offset += count
        while buffers and count >= buffers[0].nbytes:
            count -= buffers[0].nbytes
            buffers = buffers[1:]
        if count:
            buffers = [buffers[0][count:], *buffers[1:]]
