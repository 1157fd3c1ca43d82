"""The tokens of some clips, read in chunks that stay in a processor's cache.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, Q tokens of a chunk.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.quantize import QuantizedTokens

# Measured on two Zen 4 cores (docs/architecture.md): matrix products over queries want some 256 rows of
# frames and clips, and a chunk with its companions should stay in the outer cache.
CPU_ROWS = 256
CPU_CHUNK_BYTES = 3 << 20
# Blocks are worked on at once, in threads that take turns at some 40 ms of Python a block: more or smaller blocks
# would wait for one another (by arithmetic; measured on two cores only).
CPU_BLOCKS_AT_ONCE = 8
CPU_ROWS_AT_LEAST = 64
# Of fewer values than this a layer's time is Python's, which threads only pass to and fro: two blocks took four
# times as long as one at 0.14 million values, twice at 3.2, and the same from 6.4 on.
CPU_ONE_BLOCK_VALUES = 4 << 20
# A GPU wants few, large kernels.
GPU_ROWS = 1 << 14
GPU_CHUNK_BYTES = 1 << 28

# Of so many chunks one does not keep its normalised tokens for the backward pass, which makes them again. Each
# third costs about a twentieth of the time and saves a quarter of the memory (docs/architecture.md).
REMAKE_ONE_OF = 3


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens taken together: the class token alone, or neighbours in one column of the grid.

    tokens: which of the N; order: where they lie in the order of the walk (a permutation of N).
    kept: where they lie among the tokens that are kept for the backward pass; None if they are not.
    column, rows: of the grid; column is None for the class token, and rows then empty.
    """

    tokens: slice
    order: slice
    kept: slice | None
    column: int | None
    rows: range

    @property
    def size(self) -> int:
        """Q."""
        return max(len(self.rows), 1)

    @property
    def patches(self) -> slice:
        """The same tokens counted without the class token."""
        return slice(self.tokens.start - 1, self.tokens.stop - 1, self.tokens.step)


def block_sizes(shape: torch.Size, device: torch.device) -> list[int]:
    """How many clips to take through a layer together: as equal as can be, on a CPU for all threads.

    shape: of its tokens, (B, T, N, C).
    """
    clips, frames = shape[:2]
    if device.type == "cpu" and shape.numel() <= CPU_ONE_BLOCK_VALUES:
        return [clips]
    if device.type != "cpu":
        workers, rows = 1, GPU_ROWS
    else:
        useful = max(2, min(clips * frames // CPU_ROWS_AT_LEAST, CPU_BLOCKS_AT_ONCE))
        workers, rows = min(torch.get_num_threads(), useful), CPU_ROWS
    rounds = -(-clips * frames // (rows * workers))
    blocks = max(1, min(clips, rounds * workers))
    bounds = [clips * i // blocks for i in range(blocks + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def walk(grid: tuple[int, int], bytes_per_token: int, device: torch.device) -> Iterator[Chunk]:
    """All N tokens, in chunks: the class token, then column by column of the grid.

    bytes_per_token: of one of the N tokens in all frames and clips taken together.
    """
    height, width = grid
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    parts = -(-height // max(1, budget // bytes_per_token))
    step = -(-height // parts)  # as equal as can be
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


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """Tokens of some clips: `tokens` (B, T, N, C) floating, or int8 codes with `affine` (B, 2, C).

    token_scale: (B, T, N) or None. A value is (code * affine[:, 0] + affine[:, 1]) * token_scale.
    """

    tokens: Tensor
    affine: Tensor | None
    token_scale: Tensor | None

    def load(self, chunk: Chunk, out: Tensor) -> Tensor:
        """The chunk's tokens, frames first: (Q, T, B, C), written into `out` and returned."""
        out.copy_(self.tokens[:, :, chunk.tokens].permute(2, 1, 0, 3))
        if self.affine is not None:
            affine = self.affine.to(out.dtype)
            torch.addcmul(affine[:, 1], out, affine[:, 0], out=out)
        if self.token_scale is not None:
            out.mul_(self.token_scale[:, :, chunk.tokens].permute(2, 1, 0).to(out.dtype)[..., None])
        return out


def token_block(tokens: Tensor | QuantizedTokens | LayerTokens) -> TokenBlock:
    """One layer's tokens, however they came; where heads share them, decoded once for all."""
    if isinstance(tokens, LayerTokens):
        tokens = tokens.values
    if isinstance(tokens, QuantizedTokens):
        return TokenBlock(tokens=tokens.codes, affine=tokens.affine, token_scale=tokens.scale)
    return TokenBlock(tokens=tokens, affine=None, token_scale=None)
