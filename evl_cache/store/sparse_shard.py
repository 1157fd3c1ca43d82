"""A shard file on a local disk whose chunks arrive one after another from elsewhere.

It is a Zarr v3 shard like any other, with every chunk at its final place and a whole index at the end; between
both lies a byte a chunk that says whether the chunk is there yet. Where it is not, the file has a hole, which no
reader of ours takes for a chunk: chunks of such files are always checked against their mark.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.codec import CRC_NBYTES, ChunkCodec, byte_view, crc32c
from evl_cache.store.marks import FileRecord
from evl_cache.store.objects import Data
from evl_cache.store.shard_index import MISSING

_HERE = b"\1"
_REMEDY = "free space, name another disk with EVL_CACHE_COPY_ROOT, or a smaller EVL_CACHE_COPY_GB"
_TOUCH_S = 10.0  # how exactly it is known when a file was last used


class SparseShard:
    """One such file, open. Several processes may fill one at once: what they write is the same.

    Args:
        path: where it lies; made where it does not. record: of the shard, from its mark. codec: of its chunks.

    Raises: CacheError where the disk refuses; CacheDamaged where the shard is not laid out as ours are.
    """

    def __init__(self, path: Path, record: FileRecord, codec: ChunkCodec) -> None:
        self.path, self._codec = path, codec
        self.nbytes = np.frombuffer(record.chunk_nbytes, "<u4").astype(np.int64)
        self.starts = _starts(self.nbytes.tolist(), codec)
        self._checksums = record.checksums
        self._flags = int(self.starts[-1])
        if self._flags + 16 * len(self.nbytes) + CRC_NBYTES != record.size:
            raise CacheDamaged(f"{path}: its mark says {record.size} bytes, which its chunks do not make up")
        self._descriptor = self._open()
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
        """Whether chunks (ascending) are here."""
        first = chunks[0]
        flags = os.pread(self._descriptor, chunks[-1] + 1 - first, self._flags + first)
        if len(flags) == len(chunks):
            return b"\0" not in flags
        return all(flags[chunk - first] for chunk in chunks)

    def touch(self) -> None:
        """The file is in use: others are removed before it."""
        if time.monotonic() - self._touched > _TOUCH_S:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def first_wrong(self, first: int, stop: int, data: Data) -> int | None:
        """The first of chunks first .. stop-1 that `data` does not hold as its mark says, or None."""
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
            view, offset = memoryview(data), int(self.starts[first])
            while len(view):
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count
            os.pwrite(self._descriptor, _HERE * (stop - first), self._flags + first)
        except OSError as error:
            raise CacheError(f"cannot write {self.path}: {error.strerror}; {_REMEDY}") from error

    def drop_damaged(self, chunks: Sequence[int]) -> None:
        """Say of chunks that are not as their marks want them that they are not here."""
        for chunk in chunks:
            stored = os.pread(self._descriptor, int(self.nbytes[chunk]), int(self.starts[chunk]))
            if self.first_wrong(chunk, chunk + 1, stored) is not None:
                os.pwrite(self._descriptor, b"\0", self._flags + chunk)

    def _open(self) -> int:
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process's new file may be replaced so: it sees that it is gone, and opens this one.
            temporary = self.path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
            try:
                with temporary.open("xb") as file:
                    file.seek(self._flags)
                    file.write(bytes(len(self.nbytes)) + self._index())
                temporary.rename(self.path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise CacheError(f"cannot write {self.path}: {error.strerror}; {_REMEDY}") from error

    def _index(self) -> bytes:
        index = np.full((len(self.nbytes), 2), MISSING, dtype="<u8")
        there = self.nbytes > 0
        index[there, 0], index[there, 1] = self.starts[:-1][there], self.nbytes[there]
        written = index.tobytes()
        return written + crc32c(written).to_bytes(CRC_NBYTES, "little")


def _starts(chunk_nbytes: Sequence[int], codec: ChunkCodec) -> NDArray[np.int64]:
    """Where writers of ours put chunks, and where the last one ends."""
    starts, end = [], 0
    for nbytes in chunk_nbytes:
        start = codec.place(end, nbytes)
        starts.append(start)
        end = start + nbytes
    return np.array([*starts, end], dtype=np.int64)
