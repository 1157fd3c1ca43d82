"""The index of a shard file, and the open file it belongs to.

The index ends the file: for every chunk in C order of the grid its offset and size as little-endian uint64
(both 2^64-1 where it is missing), then the CRC-32C of these. Zarr v3, sharding codec, `index_location: end`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.disk.file_system import disk_error
from evl_cache.store.shards.codec import CRC_NBYTES
from evl_cache.store.shards.shard_file import LocalFile, ShardFile

MISSING = 2**64 - 1
_ENTRY_NBYTES = 16
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}


def index_content(index: NDArray[np.uint64]) -> bytes:
    """Return the bytes that end a shard with this index, (chunks, 2)."""
    content = index.astype("<u8", copy=False).tobytes()
    return content + crc32c(content).to_bytes(CRC_NBYTES, "little")


def index_nbytes(num_chunks: int) -> int:
    """Return the size of the index that ends a shard."""
    return num_chunks * _ENTRY_NBYTES + CRC_NBYTES


def check_end(path: Path, end: bytes, file_nbytes: int, num_chunks: int) -> None:
    """Check the index in the last bytes of a shard that was read. Raises: CacheDamaged as `read_index`."""
    try:
        data_nbytes = _data_nbytes(file_nbytes, index_nbytes(num_chunks))
        _parsed(np.frombuffer(end, np.uint8), data_nbytes, num_chunks)
    except CacheDamaged as error:
        raise CacheDamaged(f"{path} {error}; verify and repair the cache") from error


def read_index(path: Path, num_chunks: int) -> NDArray[np.uint64]:
    """Return the index of a shard, (num_chunks, 2): offset and size, 2^64-1 twice for a missing chunk.

    Raises: as `OpenShard.open`.
    """
    return OpenShard.open(path, num_chunks).index


class OpenShard:
    """An open shard with its index, in the process that opened it; closed when its last user lets go."""

    def __init__(self, file: ShardFile, num_chunks: int) -> None:
        self.file = file
        self.pid = os.getpid()
        self.index = _index_of(file, num_chunks)

    @classmethod
    def open(
        cls, path: Path, num_chunks: int, *, open_file: Callable[[Path], ShardFile] = LocalFile
    ) -> OpenShard:
        """Open and read the index. Raises CacheDamaged (gone, not intact), CacheError (no access)."""
        try:
            return cls(open_file(path), num_chunks)
        except CacheDamaged as error:
            if (refusal := refusal_of(error)) is not None:
                raise disk_error("read", path, refusal) from error
            raise CacheDamaged(f"{path} {error}; verify and repair the cache") from error
        except OSError as error:
            problem = f"cannot read {path}: {error.strerror}"
            if error.errno in _DAMAGE:
                raise CacheDamaged(f"{problem}; verify and repair the cache") from error
            remedy = "check its permissions and the limit on open files (ulimit -n)"
            raise CacheError(f"{problem}; {remedy}") from error

    def will_need(self, chunks: Sequence[int]) -> None:
        """Have the kernel read chunks ahead; they should lie together in the file."""
        entries = self.index[list(chunks)]
        entries = entries[entries[:, 0] != np.uint64(MISSING)]
        if len(entries):
            stop = int((entries[:, 0] + entries[:, 1]).max())
            self.file.will_need(int(entries[:, 0].min()), stop)


def refusal_of(error: BaseException) -> OSError | None:
    """Return the disk's own error behind one of reading, unless it tells of damage: then a repair cannot help."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return None if cause is None or cause.errno in _DAMAGE else cause


def _index_of(file: ShardFile, num_chunks: int) -> NDArray[np.uint64]:
    """Return a shard's index. Raises CacheDamaged unless every chunk lies inside the file and before the index."""
    stored = np.empty(index_nbytes(num_chunks), np.uint8)
    data_nbytes = _data_nbytes(file.size_now(), len(stored))
    file.read([stored], data_nbytes)
    return _parsed(stored, data_nbytes, num_chunks)


def _data_nbytes(file_nbytes: int, own_nbytes: int) -> int:
    if file_nbytes < own_nbytes:
        raise CacheDamaged(f"is cut off: {file_nbytes} bytes, its index alone has {own_nbytes}")
    return file_nbytes - own_nbytes


def _parsed(stored: NDArray[np.uint8], data_nbytes: int, num_chunks: int) -> NDArray[np.uint64]:
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
