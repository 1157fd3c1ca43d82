"""Raw chunks of a mapped shard as rows of a table: a sample's layers are then one slice, read with little Python.

L layers, n bytes of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evl_cache.store.codec import CRC_NBYTES, crc32c, crc32c_at
from evl_cache.store.shard_index import MISSING

# Larger chunks are copied and checked one by one, while the copy is in the processor's cache.
_TOGETHER_NBYTES = 1 << 16


class RawRows:
    """The chunks that a shard of raw chunks has, one after another in C order as writers of ours leave them.

    Args:
        mapped: the file's bytes. chunk_nbytes: n. present: which chunks there are, in C order of the grid.
        checksums: of every chunk, from the mark; None checks each against the CRC-32C in the file alone.
    """

    def __init__(
        self,
        mapped: NDArray[np.uint8],
        *,
        chunk_nbytes: int,
        checksums: NDArray[np.uint32] | None,
        present: NDArray[np.bool_],
    ) -> None:
        self._nbytes = chunk_nbytes
        stored = chunk_nbytes + CRC_NBYTES
        count = int(present.sum())
        table = mapped[: count * stored].reshape(count, stored)
        self._rows = table[:, :chunk_nbytes]
        self._tails = np.ndarray((count,), "<u4", buffer=table, offset=chunk_nbytes, strides=(stored,))
        self._row_of: list[int] = np.where(present, np.cumsum(present) - 1, -1).tolist()
        self._checksums: list[int] | None = None if checksums is None else checksums.tolist()

    @classmethod
    def of(
        cls,
        mapped: NDArray[np.uint8],
        index: NDArray[np.uint64],
        *,
        chunk_nbytes: int,
        checksums: NDArray[np.uint32] | None,
    ) -> RawRows | None:
        """The table, or None where the chunks lie otherwise. `index`: of the shard, (chunks, 2)."""
        present = index[:, 1] != np.uint64(MISSING)
        offsets = index[present, 0]
        stored = np.uint64(chunk_nbytes + CRC_NBYTES)
        if len(offsets) == 0 or not np.array_equal(
            offsets, np.arange(len(offsets), dtype=np.uint64) * stored
        ):
            return None
        return cls(mapped, chunk_nbytes=chunk_nbytes, checksums=checksums, present=present)

    def copy(
        self, chunks: range, out: NDArray[Any], *, trust: bool, check: Callable[[int, int, int | None], None]
    ) -> bool:
        """Copy chunks into `out` (L, ...), of which each layer is contiguous.

        Args:
            check: called with chunk, CRC-32C of what was copied, and the one in the file; raises where it must.
                Not called for what `trust` leaves out, nor for chunks whose three checksums agree.

        Returns: whether all the chunks are there; nothing was done where not.
        """
        rows = self._row_of[chunks.start : chunks.stop : chunks.step]
        first, last = rows[0], rows[-1]
        if first < 0 or last - first != (len(rows) - 1) * chunks.step:
            return False
        taken = slice(first, last + 1, chunks.step)
        target: NDArray[np.uint8] = out.reshape(len(rows), -1).view(np.uint8)  # a view, see above
        source = self._rows[taken]
        if trust:
            np.copyto(target, source)
            return True
        if self._nbytes < _TOGETHER_NBYTES:
            np.copyto(target, source)
            found = [crc32c(row) for row in target]
        else:
            address, stride = target.ctypes.data, target.strides[0]
            found = []
            for layer, row in enumerate(source):
                np.copyto(target[layer], row)
                found.append(crc32c_at(address + layer * stride, self._nbytes))
        stored = self._tails[taken].tolist()
        expected = stored if self._checksums is None else [self._checksums[chunk] for chunk in chunks]
        if found != stored or found != expected:
            for chunk, value, tail in zip(chunks, found, stored, strict=True):
                check(chunk, value, tail)
        return True
