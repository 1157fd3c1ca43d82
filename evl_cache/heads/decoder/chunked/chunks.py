"""The tokens of some clips, read in chunks that stay in a processor's cache.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, Q tokens of a chunk.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Measured on two Zen 4 cores: matrix products over queries are fastest with some 256 rows of frames and clips, and a
# chunk with its intermediate results should stay in the outermost cache.
CPU_ROWS = 256
CPU_CHUNK_BYTES = 3 << 20
# Threads work on slices of clips at once, and each slice needs about 40 ms of Python, which only one thread runs at a
# time. With more or smaller slices threads would wait for one another (computed; measured on two cores only).
CPU_SLICES_AT_ONCE = 8
CPU_ROWS_AT_LEAST = 64
# Below this many values a layer takes as long as its Python, so threads do not help: two slices took four times as
# long as one at 0.14 million values, twice as long at 3.2 million, and the same from 6.4 million on.
CPU_ONE_SLICE_VALUES = 4 << 20

# Every third chunk does not keep its normalised tokens for the backward pass, which computes them again. That takes
# about a twentieth more time and a quarter less memory.
REMAKE_ONE_OF = 3


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens taken together: the class token alone, or neighbours in one column of the grid.

    Attributes:
        tokens: which of the N tokens they are.
        order: their places in the order of the walk, a permutation of the N tokens.
        kept: their places among the tokens kept for the backward pass, or None.
        column: their column of the grid; None for the class token.
        rows: their rows of the grid; empty for the class token.
    """

    tokens: slice
    order: slice
    kept: slice | None
    column: int | None
    rows: range

    @property
    def size(self) -> int:
        """The number of tokens, Q."""
        return max(len(self.rows), 1)

    @property
    def patches(self) -> slice:
        """The tokens' places among the P patches."""
        return slice(self.tokens.start - 1, self.tokens.stop - 1, self.tokens.step)


def slice_sizes(shape: torch.Size) -> list[int]:
    """Return how many clips each slice of a batch has, as equal as possible; there is work for all threads.

    Args:
        shape: of one layer's tokens, (B, T, N, C).
    """
    clips, frames = shape[:2]
    if shape.numel() <= CPU_ONE_SLICE_VALUES:
        return [clips]
    useful = max(2, min(clips * frames // CPU_ROWS_AT_LEAST, CPU_SLICES_AT_ONCE))
    workers = min(torch.get_num_threads(), useful)
    rounds = -(-clips * frames // (CPU_ROWS * workers))
    slices = max(1, min(clips, rounds * workers))
    bounds = [clips * i // slices for i in range(slices + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def walk(grid: tuple[int, int], bytes_per_token: int) -> Iterator[Chunk]:
    """Yield all N tokens in chunks: the class token, then the patches column by column of the grid.

    Args:
        grid: (Hp, Wp).
        bytes_per_token: bytes that one of the N tokens has in all frames and clips together.
    """
    height, width = grid
    parts = -(-height // max(1, CPU_CHUNK_BYTES // bytes_per_token))
    step = -(-height // parts)  # as equal as possible
    yield Chunk(tokens=slice(0, 1, 1), order=slice(0, 1), kept=slice(0, 1), column=None, rows=range(0))
    done, kept = 1, 1
    for number, (column, top) in enumerate(itertools.product(range(width), range(0, height, step))):
        rows = range(top, min(top + step, height))
        first = 1 + top * width + column
        keep = number % REMAKE_ONE_OF != REMAKE_ONE_OF - 1
        yield Chunk(
            tokens=slice(first, first + (len(rows) - 1) * width + 1, width),
            order=slice(done, done + len(rows)),
            kept=slice(kept, kept + len(rows)) if keep else None,
            column=column,
            rows=rows,
        )
        done += len(rows)
        kept += len(rows) * keep
