"""Motion vectors from adjacent-frame maps on whole tensors: one batched product for some rows of the grid.

B clips, T frames, P patches (grid Hp x Wp), C channels, h query rows of the grid taken at once, S = h Wp query patches
of them, R rows of a motion table, (2Hp-1)(2Wp-1).
Source: section 3.3 of arXiv 2208.03550.

A query patch (qi, qj) reads row (qi-ki+Hp-1, qj-kj+Wp-1) of a table for key (ki, kj). With the keys in reverse order it
is (qi+ki, qj+kj), so that the windows of all queries are one overlapping view of the table, and the table's gradient is
a sum over the diagonals of the windows' gradients. The maps to the frame before and to the frame after lie side by side
as one row of 2P values, since both products are added to the same token. A frame without a neighbour has zeros there.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from evl_cache.heads.decoder.products import product
from evl_cache.heads.decoder.tensors import StoredMaps

# Windows of the table and their gradients, which exist for some rows of the grid at a time: 5 of 14 for ViT-B/16.
WINDOW_BYTES = 160 << 20


class WholeMotion:
    """Motion in both directions of one forward or backward pass over some clips.

    Args:
        maps: maps of the clips.
        tables: motion tables prev and next, flipped, (R, C) each.
        grid: (Hp, Wp).
        products: the dtype to multiply in; sums are in the tables'.
    """

    def __init__(
        self, maps: StoredMaps, tables: tuple[Tensor, Tensor], grid: tuple[int, int], products: torch.dtype
    ) -> None:
        self.grid, self.sums, self.width = grid, tables[0].dtype, tables[0].shape[-1]
        height, width = grid
        # Flipped once more: keys are in reverse order here.
        both = torch.stack(tables).flip(1).to(products)
        self._tables = both.view(2, 2 * height - 1, 2 * width - 1, self.width)
        self.rows = _rows_of(maps, products)  # (P,T,B,2P)

    def add(self, positioned: Tensor) -> None:
        """Add the motion of all patches to `positioned` (P, T, B, C), in place."""
        for patches in self._parts():
            moved = product(self._maps(patches), self._windows(patches), self.sums)  # (S,T B,C)
            positioned[patches].flatten(1, 2).add_(moved)

    def table_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the flipped tables, (R, C) each, from that of all patches (P, T, B, C)."""
        height, width = self.grid
        by_column = []
        for patches in self._parts():
            of_patches = gradient[patches].flatten(1, 2)  # (S,T B,C)
            windows = product(self._maps(patches).transpose(1, 2), of_patches, self.sums)  # (S,2P,C)
            by_column.append(diagonal_sums(windows.view(-1, width, 2 * height, width, self.width)))
        rows = torch.cat(by_column).view(1, height, 2, height, -1)  # (1,Hp,2,Hp,(2Wp-1) C)
        prev, following = diagonal_sums(rows).view(2, -1, self.width).flip(1)
        return prev, following

    def map_gradients(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the maps, (B, 2, T-1, P, P), from that of all patches (P, T, B, C)."""
        rows = [
            product(gradient[patches].flatten(1, 2), self._windows(patches).transpose(1, 2), self.sums)
            for patches in self._parts()
        ]
        by_direction = torch.cat(rows).view(*self.rows.shape[:3], 2, -1)  # (P,T,B,2,P)
        both = torch.stack([by_direction[:, 1:, :, 0], by_direction[:, :-1, :, 1]])  # (2,P,T-1,B,P)
        return both.permute(3, 0, 2, 1, 4).flip(-1)

    def _parts(self) -> Iterator[slice]:
        """Yield the query patches of some whole rows of the grid at a time."""
        height, width = self.grid
        # The gradients of windows, spread out to be added along their diagonals: the most memory.
        bytes_per_row = width * 2 * height * (2 * width - 1) * self.width * self.sums.itemsize
        step = max(1, WINDOW_BYTES // bytes_per_row)
        for top in range(0, height, step):
            yield slice(top * width, min(top + step, height) * width)

    def _maps(self, patches: slice) -> Tensor:
        """Return the maps of some query patches, (S, T B, 2P)."""
        return self.rows[patches].flatten(1, 2)

    def _windows(self, patches: slice) -> Tensor:
        """Return the rows of both tables that some query patches read, (S, 2P, C)."""
        height, width = self.grid
        down, right, channel = self._tables.stride()[1:]
        table = self._tables[:, patches.start // width :]
        rows = (patches.stop - patches.start) // width
        windows = table.as_strided(
            (rows, width, 2, height, width, self.width),
            (down, right, table.stride(0), down, right, channel),
        )
        return windows.reshape(rows * width, 2 * height * width, self.width)


def diagonal_sums(values: Tensor) -> Tensor:
    """Return the sums over q of values (A, Q, M, K, C) where q + k is the same, (A, M, Q+K-1, C).

    In a fixed order, so the same bits every time.
    """
    groups, queries, middle, keys, width = values.shape
    sums = queries + keys - 1
    spread = values.new_zeros(groups, queries, middle, sums, width)
    strides = list(spread.stride())
    strides[1] += strides[3]  # query q begins q places later
    spread.as_strided(values.shape, strides).copy_(values)
    return spread.sum(1)


def _rows_of(maps: StoredMaps, dtype: torch.dtype) -> Tensor:
    """Return the maps of both directions side by side, keys in reverse order, decoded: (P, T, B, 2P)."""
    clips, _, pairs, patches, _ = maps.maps.shape
    reverse = StoredMaps(maps=maps.maps.flip(-1), row_max=maps.row_max)
    rows = maps.maps.new_empty(patches, pairs + 1, clips, 2, patches, dtype=dtype)
    rows[:, 0, :, 0] = 0
    rows[:, -1, :, 1] = 0
    reverse.load(0, slice(None), rows[:, 1:, :, 0])
    reverse.load(1, slice(None), rows[:, :-1, :, 1])
    return rows.flatten(3)
