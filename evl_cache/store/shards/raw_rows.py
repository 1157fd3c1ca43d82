"""Raw chunks of a mapped shard as rows of a table: a sample's layers are one slice, copied with little Python.

L layers, n bytes of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.shards.shard_file import ShardFile
from evl_cache.store.shards.shard_index import MISSING

# Larger chunks are copied and checked one by one, while the copy is in the processor's cache.
_TOGETHER_NBYTES = 1 << 16

Check = Callable[[int, int, int | None], None]


class RawRows:
    """The chunks that a shard of raw chunks has, at even distances in C order as writers of ours leave them.

    Args:
        mapped: the file's bytes. size_now: gives the file's size.
        start, stride: bytes to the first chunk, and from one to the next.
        present: which chunks there are, in C order of the grid. chunk_shape, dtype: of a chunk.
        checksums: of every chunk, from the mark; None checks each against the CRC-32C in the file alone.
        check: called with chunk, CRC-32C of what was copied, and the one in the file, where they are not what they
            should be; raises. None: nothing is checked.
    """

    def __init__(
        self,
        mapped: NDArray[np.uint8],
        *,
        size_now: Callable[[], int],
        start: int,
        stride: int,
        present: NDArray[np.bool_],
        chunk_shape: Sequence[int],
        dtype: np.dtype[Any],
        checksums: NDArray[np.uint32] | None,
        check: Check | None,
    ) -> None:
        template = np.empty(chunk_shape, dtype)
        shape, strides = (int(present.sum()), *chunk_shape), (stride, *template.strides)
        self._rows = np.ndarray(shape, dtype, buffer=mapped, offset=start, strides=strides)
        self._tails = np.ndarray(
            shape[:1], "<u4", buffer=mapped, offset=start + template.nbytes, strides=(stride,)
        )
        self._size_now, self._size = size_now, len(mapped)
        self._together = template.nbytes < _TOGETHER_NBYTES
        self._row_of: list[int] = np.where(present, np.cumsum(present) - 1, -1).tolist()
        self._checksums: list[int] | None = None if checksums is None else checksums.tolist()
        self._check = check

    @classmethod
    def of(
        cls,
        file: ShardFile,
        index: NDArray[np.uint64],
        *,
        chunk_shape: Sequence[int],
        dtype: np.dtype[Any],
        checksums: NDArray[np.uint32] | None,
        check: Check | None,
    ) -> RawRows | None:
        """The table, or None where the chunks lie otherwise. `index`: of the shard, (chunks, 2)."""
        present = index[:, 1] != np.uint64(MISSING)
        offsets = index[present, 0].astype(np.int64)
        if file.mapped is None or len(offsets) == 0:
            return None
        distances = np.diff(offsets)
        stride = int(distances[0]) if len(distances) else int(index[present, 1][0])
        if stride < int(index[present, 1].max()) or np.any(distances != stride):
            return None
        return cls(
            file.mapped,
            size_now=file.size_now,
            start=int(offsets[0]),
            stride=stride,
            present=present,
            chunk_shape=chunk_shape,
            dtype=dtype,
            checksums=checksums,
            check=check,
        )

    def copy(self, chunks: range, outs: NDArray[Any]) -> bool:
        """Copy chunks into `outs` (L, *chunk), each contiguous, and check the copies.

        Returns: whether all the chunks are there, and the file still is; nothing was done where not.
        Raises: what `check` raises.
        """
        step = chunks.step
        first, last = self._row_of[chunks.start], self._row_of[chunks[-1]]
        if first < 0 or last - first != (len(outs) - 1) * step or self._size_now() != self._size:
            return False
        taken = slice(first, last + 1, step)
        # Assigned, not np.copyto: that looks for arrays of other kinds first.
        if self._check is None:
            outs[...] = self._rows[taken]
            return True
        if self._together:
            outs[...] = self._rows[taken]
            found = [crc32c(out) for out in outs]
        else:
            found = []
            for out, row in zip(outs, self._rows[taken], strict=True):
                out[...] = row
                found.append(crc32c(out))
        stored: list[int] = self._tails[taken].tolist()
        expected = stored if self._checksums is None else self._checksums[chunks.start : chunks.stop : step]
        if found != stored or found != expected:
            for chunk, value, tail in zip(chunks, found, stored, strict=True):
                self._check(chunk, value, tail)
        return True
