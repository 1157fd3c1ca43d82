"""A shard file on a local disk whose chunks arrive one after another from elsewhere.

It is a Zarr v3 shard like any other, with every chunk at its final place and a whole index at the end. Between
both lies a byte a chunk that says whether the chunk is there yet. Where it is not, the file has a hole, which no
reader of ours takes for a chunk: chunks of such files are always checked against their mark.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.objects.address import Data
from evl_cache.store.shards.codec import CRC_NBYTES, ChunkCodec, byte_view
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.store.shards.shard_index import MISSING, index_content

_HERE = b"\1"
_REMEDY = "free space, set EVL_CACHE_COPY_ROOT to an empty directory on another disk, or a smaller EVL_CACHE_COPY_GB"
# Files are written by huge pages, and so mapped by them: raw reads are then as fast as those of a cache's own files.
_PAGE_NBYTES = 2 << 20
_LEAST_BY_PAGES = 2 * _PAGE_NBYTES  # of smaller pieces, whole pages would take much more room than data
TOUCH_S = 10.0  # how exactly it is known when a file was last used


class SparseShard:
    """A shard file that is open and being filled, by several processes at once: what they write is the same.

    Args:
        path: where it lies; made where it does not.
        record: what the shard's mark says of it.
        codec: how its chunks are stored.

    Raises: CacheError where the disk refuses; CacheDamaged where the shard is not laid out as ours are.
    """

    def __init__(self, path: Path, record: ShardRecord, codec: ChunkCodec) -> None:
        self.path, self._codec = path, codec
        self.nbytes = record.chunk_nbytes.astype(np.int64)
        self.starts = codec.starts(self.nbytes.tolist())
        self._checksums = record.chunk_checksums
        self._flags = int(self.starts[-1])
        if self._flags + 16 * len(self.nbytes) + CRC_NBYTES != record.size:
            raise CacheDamaged(f"{path}: its mark says {record.size} bytes, which its chunks do not make up")
        self._known = bytearray(len(self.nbytes))  # chunks that were here already: no call to see it again
        self._descriptor = self._open()
        self._writing = threading.Lock()
        self._touched = time.monotonic()

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close

    @property
    def is_gone(self) -> bool:
        """Whether the file was removed meanwhile to make room."""
        return os.fstat(self._descriptor).st_nlink == 0

    def has(self, chunks: Sequence[int]) -> bool:
        """Return whether chunks (ascending) are here."""
        first, stop = chunks[0], chunks[-1] + 1
        if self.knows(chunks):
            return True
        flags = os.pread(self._descriptor, stop - first, self._flags + first)
        self._known[first : first + len(flags)] = flags
        return self.knows(chunks)

    def knows(self, chunks: Sequence[int]) -> bool:
        """Return whether chunks (ascending) were seen to be here, in this file: it may have been removed since."""
        first, stop = chunks[0], chunks[-1] + 1
        if stop - first == len(chunks):
            return b"\0" not in self._known[first:stop]
        return all(self._known[chunk] for chunk in chunks)

    def touch(self) -> None:
        """Note that the file is in use: others are removed before it."""
        if time.monotonic() - self._touched > TOUCH_S:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def first_wrong(self, first: int, stop: int, data: Data) -> int | None:
        """Return the first of chunks first .. stop-1 that `data` does not hold as its mark says, or None."""
        view = byte_view(data) if not isinstance(data, bytearray) else byte_view(memoryview(data))
        base = int(self.starts[first])
        if view.nbytes != int(self.starts[stop]) - base:
            return first
        for chunk in range(first, stop):
            start, nbytes = int(self.starts[chunk]) - base, int(self.nbytes[chunk])
            if nbytes and self._codec.checksum(view[start : start + nbytes]) != int(self._checksums[chunk]):
                return chunk
        return None

    def write(self, first: int, stop: int, data: Data) -> None:
        """Put chunks first .. stop-1 in their place. Raises: CacheError where the disk refuses."""
        try:
            view, start = memoryview(data), int(self.starts[first])
            if len(view) < _LEAST_BY_PAGES:
                self._put(view, start)
            else:
                self._put_by_pages(view, start)
            os.pwrite(self._descriptor, _HERE * (stop - first), self._flags + first)
        except OSError as error:
            raise CacheError(f"cannot write {self.path}: {error.strerror}; {_REMEDY}") from error

    def _put(self, view: memoryview | bytearray, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _put_by_pages(self, view: memoryview, start: int) -> None:
        """Write pages that the data fill in part whole where nothing is yet: what is missing comes later."""
        stop = start + len(view)
        with self._alone():
            for page in range(start // _PAGE_NBYTES * _PAGE_NBYTES, stop, _PAGE_NBYTES):
                first, last = max(page, start), min(page + _PAGE_NBYTES, stop)
                end = min(page + _PAGE_NBYTES, self._flags)
                part: memoryview | bytearray = view[first - start : last - start]
                if (first, last) != (page, end) and os.lseek(self._descriptor, page, os.SEEK_DATA) >= end:
                    part, first = bytearray(first - page) + part + bytes(end - last), page
                self._put(part, first)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads, and processes that opened the file for themselves, from writing pages."""
        with self._writing:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def drop_damaged(self, chunks: Sequence[int]) -> None:
        """Say of those chunks that are not as their mark wants them that they are not here."""
        for chunk in chunks:
            start, stop = int(self.starts[chunk]), int(self.starts[chunk + 1])
            stored = os.pread(self._descriptor, stop - start, start)
            if self.first_wrong(chunk, chunk + 1, stored) is not None:
                os.pwrite(self._descriptor, b"\0", self._flags + chunk)
                self._known[chunk] = 0

    def _open(self) -> int:
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process's new file may be replaced so: it sees that it is gone, and opens this one.
            temporary = self.path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
            try:
                with temporary.open("xb") as file:
                    tail = self._flags % _PAGE_NBYTES if self._flags >= _LEAST_BY_PAGES else 0
                    file.seek(self._flags - tail)
                    file.write(bytes(tail + len(self.nbytes)) + self._index())
                temporary.rename(self.path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise CacheError(f"cannot write {self.path}: {error.strerror}; {_REMEDY}") from error

    def _index(self) -> bytes:
        index = np.full((len(self.nbytes), 2), MISSING, dtype="<u8")
        there = self.nbytes > 0
        index[there, 0], index[there, 1] = self.starts[:-1][there], self.nbytes[there]
        return index_content(index)
