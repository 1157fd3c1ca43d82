"""Shard files of the Zarr v3 `sharding_indexed` codec: a streaming writer and a direct reader.

Written shards hold the encoded chunks of a grid one after another in C order, then the index (`shard_index`).
Reading is not tied to that order.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.disk.file_system import disk_error
from evl_cache.store.disk.publish import StagedFile
from evl_cache.store.shards.codec import ALIGNMENT, CRC_NBYTES, Array, ChunkCodec, byte_view, scratch
from evl_cache.store.shards.raw_rows import RawRows, even_stride
from evl_cache.store.shards.shard_file import LocalFile, ShardFile, check_size
from evl_cache.store.shards.shard_index import MISSING, OpenShard, index_content, refusal_of

MISSING_CHECKSUM = 0  # CRC-32C of no bytes
_MAX_RUN_CHUNKS = 256  # read by one call: two buffers each stay below the kernel's 1024
_MAX_RUN_NBYTES = 16 << 20  # and what a thread keeps for encoded chunks stays bounded


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a mark keeps of a shard file.

    The chunks' numbers stay packed, little-endian uint32 in C order of the grid: a large cache has millions.

    Attributes:
        size: bytes of the file.
        sha256: digest of the file, hexadecimal.
        packed_nbytes: stored size of each chunk; 0 where it is missing.
        packed_checksums: `ChunkCodec.checksum` of each chunk; 0 where it is missing.
    """

    size: int
    sha256: str
    packed_nbytes: bytes
    packed_checksums: bytes

    @property
    def digest(self) -> tuple[int, str]:
        """Size and sha256 of the file, as `file_digest` returns them."""
        return self.size, self.sha256

    @property
    def chunk_nbytes(self) -> NDArray[np.uint32]:
        """Stored sizes, (chunks,)."""
        return np.frombuffer(self.packed_nbytes, "<u4")

    @property
    def chunk_checksums(self) -> NDArray[np.uint32]:
        """Checksums, (chunks,)."""
        return np.frombuffer(self.packed_checksums, "<u4")


class ShardWriter:
    """A staged file to which chunks are appended in C order of `grid`, one in memory at once; publish after `close`."""

    def __init__(self, staged: StagedFile, *, grid: Sequence[int], codec: ChunkCodec) -> None:
        self.codec = codec
        self.num_chunks = math.prod(grid)
        self._staged = staged
        self._checksums: list[int] = []
        self._index = np.full((self.num_chunks, 2), MISSING, dtype="<u8")
        self._template: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self._closed = False

    def append(self, chunk: Array | None, *, position: int | None = None) -> None:
        """Write the next chunk; None leaves it missing. All chunks have one shape and one dtype.

        `position`, where given, has to be the place of the next chunk: chunks out of order raise UsageError,
        and so do too many. Raises CacheError where the disk refuses.
        """
        if chunk is None:
            self.append_encoded(None, position=position)
            return
        template = (chunk.shape, chunk.dtype)
        self._template = self._template or template
        if template != self._template:
            raise UsageError(f"chunk is {template}, the first one was {self._template}: make them equal")
        self.append_encoded(*self.codec.encode_checked(chunk), position=position)

    def append_encoded(
        self, encoded: bytes | None, checksum: int | None = None, *, position: int | None = None
    ) -> None:
        """Write the next chunk as `codec.encode_checked` made it, so that threads may encode. Errors as `append`."""
        self._check_next(position)
        if encoded is None:
            self._checksums.append(MISSING_CHECKSUM)
            return
        if len(encoded) == 0:
            raise UsageError("encoded chunk has no bytes: pass None for a missing chunk")
        self._staged.write(bytes(self.codec.place(self._staged.size, len(encoded)) - self._staged.size))
        checksum = self.codec.checksum(encoded) if checksum is None else checksum
        self._index[len(self._checksums)] = self._staged.size, len(encoded)
        self._checksums.append(checksum)
        # A raw chunk's checksum leaves out the last bytes, which hold it.
        whole = crc32c(encoded[-CRC_NBYTES:], checksum) if self.codec.name == "raw" else checksum
        self._staged.write(encoded, checksum=whole)

    def close(self) -> ShardRecord:
        """Write the index; chunks not appended (the end of a short last shard) are missing."""
        if self._closed:
            raise UsageError("shard is closed already: close it once")
        self._closed = True
        self._checksums += [MISSING_CHECKSUM] * (self.num_chunks - len(self._checksums))
        self._staged.write(index_content(self._index))
        present = self._index[:, 0] != np.uint64(MISSING)
        return ShardRecord(
            size=self._staged.size,
            sha256=self._staged.sha256,
            packed_nbytes=np.where(present, self._index[:, 1], 0).astype("<u4").tobytes(),
            packed_checksums=np.asarray(self._checksums, "<u4").tobytes(),
        )

    def _check_next(self, position: int | None) -> None:
        expected = len(self._checksums)
        if self._closed or expected == self.num_chunks:
            raise UsageError(f"shard of {self.num_chunks} chunks is full or closed: nothing can be appended")
        if position is not None and position != expected:
            raise UsageError(f"chunk {position} appended where {expected} is due: append in C order")


class ShardReader:
    """A shard file whose whole chunks are read. Opened at first use and again after a fork; threads may share it.

    Errors of reading are CacheDamaged and name file and chunk. A missing chunk is one. Where the disk refuses (it is
    gone, or a permission is) they are CacheError.

    Args:
        path: where the shard lies.
        grid: chunks per axis of the shard, in whose C order chunks are numbered.
        chunk_shape: shape of a chunk.
        dtype: data type of the values, little endian.
        codec: how chunks are stored.
        checksums: one a chunk, from the mark; checked at every read beside the checksums in the file.
        trust: leave out the checks that cost a pass over the bytes (those of the mark, and of `raw` chunks).
        open_file: opens what lies at `path`; by default a file of this computer, read by calls.
    """

    def __init__(
        self,
        path: Path,
        *,
        grid: Sequence[int],
        chunk_shape: Sequence[int],
        dtype: DTypeLike,
        codec: ChunkCodec,
        checksums: ArrayLike | None = None,
        trust: bool = False,
        open_file: Callable[[Path], ShardFile] = LocalFile,
    ) -> None:
        self.path = Path(path)
        self._trust, self._open_file = trust, open_file
        self.num_chunks = math.prod(grid)
        self.chunk_shape = tuple(chunk_shape)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.codec = codec
        self.chunk_nbytes = math.prod(self.chunk_shape) * self.dtype.itemsize
        self.checksums = None if checksums is None else np.asarray(checksums, dtype=np.uint32)
        if self.checksums is not None and self.checksums.shape != (self.num_chunks,):
            found = self.checksums.size
            raise CacheDamaged(f"{path}: its mark has {found} checksums for {self.num_chunks} chunks")
        self._open: tuple[OpenShard, RawRows | None] | None = None

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which chunks are in the file, shape (num_chunks,)."""
        present: NDArray[np.bool_] = self._opened()[0].index[:, 1] != np.uint64(MISSING)
        return present

    def read_chunk(self, chunk: int, out: Array | None = None) -> Array:
        """Return one chunk, read into `out` (C-contiguous) where given."""
        out = np.empty(self.chunk_shape, self.dtype) if out is None else out
        self.read_chunks([chunk], [out])
        return out

    def read_chunks(self, chunks: Sequence[int], outs: Sequence[Array] | Array) -> None:
        """Fill `outs[k]` with `chunks[k]`; neighbours in the file are read by one call.

        After an error the outputs hold anything.
        """
        if len(chunks) != len(outs):
            raise UsageError(f"{len(chunks)} chunks for {len(outs)} outputs: give one output for each chunk")
        targets = [self._target(out) for out in outs]
        try:
            self._read_all(chunks, targets)
        except CacheDamaged as error:
            if (refusal := refusal_of(error)) is None:
                raise
            if refusal.errno != errno.ESTALE:
                raise disk_error("read", self.path, refusal) from error
            # Another machine put a new file in the place of this one, whose chunks have the checksums that the mark
            # promised, where they were kept.
            self.close()
            self._read_all(chunks, targets)

    def _read_all(self, chunks: Sequence[int], targets: list[NDArray[np.uint8]]) -> None:
        opened = self._opened()[0]
        for start, stop in self._runs(opened.index, chunks):
            self._read_run(opened, chunks[start:stop], targets[start:stop])

    def read_stacked(self, chunks: Sequence[int], outs: Array) -> None:
        """Read chunks into one array (len(chunks), *chunk_shape) of the shard's dtype, each chunk contiguous.

        A range of raw chunks of a mapped file is copied by one call. The caller answers for the arguments, and has
        not forked since the last read.
        """
        _, rows = self._open or self._opened()
        if rows is None or not isinstance(chunks, range) or not rows.copy(chunks, outs):
            self.read_chunks(chunks, outs)

    def will_need(self, chunks: Sequence[int]) -> None:
        """Have the kernel read chunks that will be asked for soon."""
        self._opened()[0].will_need(chunks)

    def close(self) -> None:
        """Let go of the file: closed once no thread reads from it. The next read opens it again."""
        self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _opened(self) -> tuple[OpenShard, RawRows | None]:
        # No lock, which a fork could leave held: two threads may both open the file, and one stays.
        found = self._open
        if found is not None and found[0].pid == os.getpid():
            return found
        opened = OpenShard.open(self.path, self.num_chunks, open_file=self._open_file)
        nbytes = opened.index[:, 1]
        wrong = (nbytes != np.uint64(MISSING)) & ~self.codec.allows_size(nbytes, self.chunk_nbytes)
        if np.any(wrong):
            chunk = int(np.argmax(wrong))
            raise self._damaged(chunk, f"cannot have {nbytes[chunk]} bytes as a {self.codec.name} chunk")
        found = self._open = opened, self._raw_rows(opened)
        return found

    def _raw_rows(self, opened: OpenShard) -> RawRows | None:
        mapped = opened.file.mapped
        if self.codec.name != "raw" or mapped is None or (stride := even_stride(opened.index)) is None:
            return None
        return RawRows(
            mapped,
            opened.file.size_now,
            opened.index,
            stride,
            np.empty(self.chunk_shape, self.dtype),
            checksums=self.checksums,
            check=None if self._trust else self._check,
        )

    def _target(self, out: Array) -> NDArray[np.uint8]:
        if out.shape != self.chunk_shape or out.dtype != self.dtype or not out.flags.writeable:
            raise UsageError(
                f"output is {out.dtype} {out.shape}, a chunk is {self.dtype} {self.chunk_shape}: "
                "make them equal, and the output writeable"
            )
        return byte_view(out)

    def _runs(self, index: NDArray[np.uint64], chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield ranges start, stop of `chunks` that lie one after another in the file."""
        start, due, run_nbytes = 0, MISSING, 0
        gap = ALIGNMENT if self.codec.name == "raw" else 1
        for k, chunk in enumerate(chunks):
            if not 0 <= chunk < self.num_chunks:
                raise UsageError(f"chunk {chunk} asked for, {self.path} has 0 to {self.num_chunks - 1}")
            offset, nbytes = (int(entry) for entry in index[chunk])
            if offset == MISSING:
                raise self._damaged(chunk, "is missing")
            full = k - start == _MAX_RUN_CHUNKS or run_nbytes + nbytes > _MAX_RUN_NBYTES
            if k > start and (not due <= offset < due + gap or full):
                yield start, k
                start, run_nbytes = k, 0
            due = offset + nbytes
            run_nbytes += nbytes
        if len(chunks) > start:
            yield start, len(chunks)

    def _read_run(self, opened: OpenShard, chunks: Sequence[int], targets: list[NDArray[np.uint8]]) -> None:
        if opened.file.mapped is not None:
            self._copy_run(opened, chunks, targets)
            return
        sizes = [int(opened.index[chunk, 1]) for chunk in chunks]
        if self.codec.name == "raw":  # straight into the outputs; what lies between goes elsewhere
            starts = opened.index[list(chunks), 0].astype(np.int64)
            between = np.diff(starts, append=starts[-1] + sizes[-1]) - self.chunk_nbytes
            tails = [np.empty(nbytes, np.uint8) for nbytes in between.tolist()]
            buffers = [part for pair in zip(targets, tails, strict=True) for part in pair]
        else:
            buffers = np.split(scratch(sum(sizes)), np.cumsum(sizes)[:-1])
        try:
            opened.file.read(buffers, int(opened.index[chunks[0], 0]))
        except CacheDamaged as error:
            raise self._damaged(chunks[0], f"{error}") from error
        for k, (chunk, target) in enumerate(zip(chunks, targets, strict=True)):
            if self.codec.name == "raw":
                self._check_raw(chunk, target, tails[k][:CRC_NBYTES])
            else:
                self._decode(chunk, buffers[k], target)

    def _copy_run(self, opened: OpenShard, chunks: Sequence[int], targets: list[NDArray[np.uint8]]) -> None:
        mapped = opened.file.mapped
        assert mapped is not None
        try:
            check_size(opened.file)
        except CacheDamaged as error:
            raise self._damaged(chunks[0], f"{error}") from error
        for chunk, target in zip(chunks, targets, strict=True):
            offset, nbytes = opened.index[chunk].tolist()
            stored = mapped[offset : offset + nbytes]
            if self.codec.name == "raw":
                np.copyto(target, stored[:-CRC_NBYTES])
                self._check_raw(chunk, target, stored[-CRC_NBYTES:])
            else:
                self._decode(chunk, stored, target)

    def _check_raw(self, chunk: int, target: NDArray[np.uint8], tail: NDArray[np.uint8]) -> None:
        if not self._trust:  # over the copy: that is what is served, and it is in the cache
            self._check(chunk, crc32c(target), int.from_bytes(tail.tobytes(), "little"))

    def _decode(self, chunk: int, encoded: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        if self.checksums is not None and not self._trust:
            self._check(chunk, self.codec.checksum(encoded), None)
        try:
            self.codec.decode(encoded, target)
        except CacheDamaged as error:
            raise self._damaged(chunk, f"{error}") from error

    def _check(self, chunk: int, found: int, stored: int | None) -> None:
        if stored is not None and found != stored:
            raise self._damaged(chunk, "does not match its inner CRC-32C")
        if self.checksums is not None and found != int(self.checksums[chunk]):
            expected = int(self.checksums[chunk])
            raise self._damaged(chunk, f"has checksum {found:08x}, its mark says {expected:08x}")

    def _damaged(self, chunk: int, reason: str) -> CacheDamaged:
        where = f"{self.path}: chunk {chunk} of {self.num_chunks}"
        return CacheDamaged(f"{where} {reason}; verify and repair the cache")
