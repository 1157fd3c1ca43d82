"""The index of a shard file, and the open file it belongs to.

The index ends the file: for every chunk in C order of the grid its offset and size as little-endian uint64
(both 2^64-1 where it is missing), then the CRC-32C of these. Zarr v3, sharding codec, `index_location: end`.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.codec import CRC_NBYTES, crc32c
from evl_cache.store.file_system import open_descriptor

MISSING = 2**64 - 1
_ENTRY_NBYTES = 16
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESTALE, errno.EIO}


def read_index(source: Path | int, num_chunks: int) -> NDArray[np.uint64]:
    """Index of a shard, a path or an open descriptor: (num_chunks, 2) offset and size, 2^64-1 twice: missing.

    Raises CacheDamaged unless it is intact and every chunk lies inside the file and before the index.
    """
    if isinstance(source, Path):
        return OpenShard.open(source, num_chunks).index
    index_nbytes = num_chunks * _ENTRY_NBYTES + CRC_NBYTES
    data_nbytes = os.fstat(source).st_size - index_nbytes
    if data_nbytes < 0:
        found = data_nbytes + index_nbytes
        raise CacheDamaged(f"is cut off: {found} bytes, its index alone has {index_nbytes}")
    stored = np.empty(index_nbytes, np.uint8)
    read_fully(source, [stored], data_nbytes)
    if crc32c(stored[:-CRC_NBYTES]) != int.from_bytes(stored[-CRC_NBYTES:].tobytes(), "little"):
        raise CacheDamaged("has an index that does not match its CRC-32C")
    index = stored[:-CRC_NBYTES].view("<u8").astype(np.uint64).reshape(num_chunks, 2)
    offset, nbytes = index[:, 0], index[:, 1]
    missing = (offset == np.uint64(MISSING)) & (nbytes == np.uint64(MISSING))
    limit = np.uint64(data_nbytes)
    # Compared by subtraction: offset + nbytes may overflow.
    inside = (nbytes <= limit) & (offset <= limit - np.minimum(nbytes, limit))
    if not np.all(missing | inside):
        raise CacheDamaged(f"has an index that puts chunk {np.argmin(missing | inside)} outside the data")
    return index


class OpenShard:
    """An open shard with its index, in the process that opened it; closed when its last user lets go.

    `mapped` is the file's bytes where it was opened so; `check_size` comes before every look at them.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._pages: mmap.mmap | None = None
        self.pid = os.getpid()
        self.index: NDArray[np.uint64] = np.empty((0, 2), np.uint64)
        self.mapped: NDArray[np.uint8] | None = None

    @property
    def descriptor(self) -> int:
        """Of the open file; there is none once it is mapped."""
        assert self._descriptor is not None
        return self._descriptor

    @classmethod
    def open(cls, path: Path, num_chunks: int, *, map_file: bool = False) -> OpenShard:
        """Open and read the index. Raises CacheDamaged (gone, not intact), CacheError (no access)."""
        try:
            opened = cls(open_descriptor(path))
            opened.index = read_index(opened.descriptor, num_chunks)
            if map_file:
                opened._map()
        except CacheDamaged as error:
            raise CacheDamaged(f"{path} {error}; verify and repair the cache") from error
        except OSError as error:
            problem = f"cannot read {path}: {error.strerror}"
            if error.errno in _DAMAGE:
                raise CacheDamaged(f"{problem}; verify and repair the cache") from error
            remedy = "check its permissions and the limit on open files (ulimit -n)"
            raise CacheError(f"{problem}; {remedy}") from error
        return opened

    def check_size(self) -> None:
        """A mapped file that was cut short would kill the process at the first touch. Raises CacheDamaged."""
        assert self.mapped is not None and self._pages is not None
        size = self._pages.size()  # of the file now, not of the map
        if size != self.mapped.nbytes:
            raise CacheDamaged(f"changed its size from {self.mapped.nbytes} to {size} bytes")

    def will_need(self, chunks: Sequence[int]) -> None:
        """Have the kernel read chunks ahead; they should lie together in the file."""
        entries = self.index[list(chunks)]
        entries = entries[entries[:, 0] != np.uint64(MISSING)]
        if len(entries):
            start = int(entries[:, 0].min())
            stop = int((entries[:, 0] + entries[:, 1]).max())
            if self._pages is not None:
                start -= start % mmap.PAGESIZE
                self._pages.madvise(mmap.MADV_WILLNEED, start, stop - start)
            elif hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self.descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _map(self) -> None:
        self._pages = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ)
        self.mapped = np.frombuffer(self._pages, np.uint8)
        self._close()  # the map keeps a descriptor of its own

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self._close()


def read_fully(descriptor: int, buffers: list[NDArray[np.uint8]], offset: int) -> None:
    """Fill the buffers one after another from `offset`. Raises CacheDamaged where the file ends or fails."""
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
