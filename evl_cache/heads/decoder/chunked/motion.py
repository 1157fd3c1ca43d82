"""Motion vectors from adjacent-frame maps by plain matrix products, without gathering a table by index.

B clips, T frames, P patches (grid Hp x Wp), C channels, Q query patches of one grid column, R rows of a
table, (2Hp-1)(2Wp-1).
Source: section 3.3 of arXiv 2208.03550.

A query patch (qi, qj) reads row (qi-ki+Hp-1)(2Wp-1) + (qj-kj+Wp-1) of a motion table for key (ki, kj). With
the table flipped, its window is a rectangle of Hp x Wp rows that starts at (Hp-1-qi, Wp-1-qj), with keys in the
order of the maps. The rectangles of one grid column of queries lie in one band of the table. Once the band is copied,
each window is a plain slice of it, and so is its gradient.
"""

import torch
from torch import Tensor

from evl_cache.heads.decoder.chunked.chunks import Chunk
from evl_cache.heads.decoder.chunked.running_mean import add_product
from evl_cache.heads.decoder.tensors import StoredMaps


class Motion:
    """Motion in both directions of one forward or backward pass over the chunks of some clips.

    Args:
        maps: maps of the clips.
        tables: motion tables prev and next, flipped, (R, C) each.
        grid: (Hp, Wp).
        space: memory for a chunk's rows of the maps, (2, Q, T-1, B, P), in the dtype to multiply in.
    """

    def __init__(
        self, maps: StoredMaps, tables: tuple[Tensor, Tensor], grid: tuple[int, int], space: Tensor
    ) -> None:
        self.maps, self.tables, self.grid, self.space = maps, tables, grid, space
        self.products = space.dtype
        self._loaded: Chunk | None = None
        self._column: int | None = None
        rows = (2 * grid[0] - 1) * grid[1]
        self._bands = tables[0].new_empty(2, rows, tables[0].shape[-1], dtype=self.products)
        self._band_gradients = torch.empty_like(self._bands, dtype=tables[0].dtype)
        self.gradients: tuple[Tensor, Tensor] | None = None

    def add(self, positioned: Tensor, chunk: Chunk) -> None:
        """Add the chunk's motion to `positioned` (Q, T, B, C), in place."""
        self._turn_to(chunk)
        for direction, moved in enumerate(_frames_moved(positioned)):
            for i, row in enumerate(chunk.rows):
                maps = self.space[direction, i].flatten(0, 1)  # ((T-1) B,P)
                add_product(moved[i], maps, self._window(self._bands[direction], row))

    def collect(self, gradient: Tensor, chunk: Chunk) -> None:
        """Add the part of a chunk's `gradient` (Q, T, B, C) to the gradients of the tables."""
        if self.gradients is None:
            prev, following = (torch.zeros_like(table) for table in self.tables)
            self.gradients = prev, following
            self._band_gradients.zero_()
        self._turn_to(chunk)
        for direction, moved in enumerate(_frames_moved(gradient)):
            for i, row in enumerate(chunk.rows):
                maps = self.space[direction, i].flatten(0, 1)  # ((T-1) B,P)
                band = self._window(self._band_gradients[direction], row)
                add_product(band, maps.t(), moved[i].to(self.products))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the flipped tables, (R, C) each."""
        self._flush()
        assert self.gradients is not None
        return self.gradients

    def collect_maps(self, gradient: Tensor, chunk: Chunk, into: Tensor) -> None:
        """Write the gradient of the chunk's rows of the maps into `into` (B, 2, T-1, P, P)."""
        self._turn_to(chunk)
        for direction, moved in enumerate(_frames_moved(gradient)):
            for i, row in enumerate(chunk.rows):
                key_window = self._window(self._bands[direction], row)
                rows = moved[i].to(self.products) @ key_window.t()  # ((T-1) B, P)
                patch = chunk.patches.start + i * chunk.patches.step
                frames = into.shape[2]
                into[:, direction, :, patch] = rows.view(frames, -1, rows.shape[-1]).transpose(0, 1)

    def _turn_to(self, chunk: Chunk) -> None:
        """Load the chunk's maps, and copy the bands of its column, each once."""
        if chunk != self._loaded:
            self._loaded = chunk
            for direction in range(2):
                self.maps.load(direction, chunk.patches, self.space[direction, : len(chunk.rows)])
        if chunk.column == self._column:
            return
        self._flush()
        self._column = chunk.column
        for table, band in zip(self.tables, self._bands, strict=True):
            rows = self._rows(table)
            band.view(rows.shape).copy_(rows)

    def _flush(self) -> None:
        """Add the bands' gradients to those of the tables."""
        if self.gradients is None or self._column is None:
            return
        for total, band in zip(self.gradients, self._band_gradients, strict=True):
            rows = self._rows(total)
            rows += band.view(rows.shape)
        self._band_gradients.zero_()

    def _rows(self, table: Tensor) -> Tensor:
        """Return the rows of a flipped table that queries of the present column read, a view (2Hp-1, Wp, C)."""
        assert self._column is not None
        height, width = self.grid
        left = width - 1 - self._column
        return table.view(2 * height - 1, 2 * width - 1, -1)[:, left : left + width]

    def _window(self, band: Tensor, row: int) -> Tensor:
        """Return the slice (P, C) of a band that the query in one grid row reads."""
        height, width = self.grid
        start = (height - 1 - row) * width
        return band[start : start + height * width]


def _frames_moved(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Return views (Q, (T-1) B, C) of a chunk (Q, T, B, C): frames with one before them, and with one after."""
    frames_and_clips, clips = chunk.flatten(1, 2), chunk.shape[2]
    return frames_and_clips[:, clips:], frames_and_clips[:, :-clips]
