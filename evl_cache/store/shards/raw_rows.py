"""Raw chunks of a mapped shard as rows of a table: a sample's layers are one slice, copied with little Python.

L layers, n bytes of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.shards.shard_index import MISSING

# Larger chunks are copied and checked one by one, while the copy is in the processor's cache.
_TOGETHER_NBYTES = 1 << 16

Check = Callable[[int, int, int | None], None]


def even_stride(index: NDArray[np.uint64]) -> int | None:
    """Return the bytes from one chunk to the next of a shard with this index, (chunks, 2); None where they differ."""
    offset, nbytes = (index[index[:, 1] != np.uint64(MISSING)].astype(np.int64)).T
    if len(offset) == 0:
        return None
    distances = np.diff(offset)
    stride = int(distances[0]) if len(distances) else int(nbytes[0])
    return None if stride < int(nbytes.max()) or np.any(distances != stride) else stride


class RawRows:
    """The chunks that a shard of raw chunks has, at even distances in C order as writers of ours leave them.

    Args:
        mapped: the file's bytes.
        size_now: gives the file's size.
        index: the shard's, (chunks, 2).
        stride: bytes from one chunk to the next.
        template: an array with the shape and dtype of a chunk.
        checksums: checksum of every chunk, from the mark; None checks each against the CRC-32C in the file alone.
        check: called with chunk, CRC-32C of what was copied, and the one in the file, where they are not what they
            should be; raises. None: nothing is checked.
    """

    def __init__(
        self,
        mapped: NDArray[np.uint8],
        size_now: Callable[[], int],
        index: NDArray[np.uint64],
        stride: int,
        template: NDArray[Any],
        *,
        checksums: NDArray[np.uint32] | None,
        check: Check | None,
    ) -> None:
        present = index[:, 1] != np.uint64(MISSING)
        count, start = int(present.sum()), int(index[present, 0][0])
        self._rows = np.ndarray(
            (count, *template.shape), template.dtype, mapped, start, (stride, *template.strides)
        )
        self._tails = np.ndarray(count, "<u4", mapped, start + template.nbytes, (stride,))
        self._size_now, self._size = size_now, len(mapped)
        self._together = template.nbytes < _TOGETHER_NBYTES
        self._row_of: list[int] = np.where(present, np.cumsum(present) - 1, -1).tolist()
        self._checksums: list[int] | None = None if checksums is None else checksums.tolist()
        self._check = check

    def copy(self, chunks: range, outs: NDArray[Any]) -> bool:
        """Copy chunks into `outs` (L, *chunk), each contiguous, and check the copies.

        Returns: whether it was done: all the chunks are there, and the file has its size still.
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
