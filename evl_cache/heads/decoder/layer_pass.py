"""One decoder layer's pass over the tokens of some clips, forward: positions, norm, softmax, weighted mean.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, H heads, Q tokens of a
chunk, K = Q T tokens of a chunk in all frames, R rows of a motion table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evl_cache.heads.decoder.chunks import Chunk, TokenBlock, walk
from evl_cache.heads.decoder.motion import MapBlock, Motion
from evl_cache.heads.decoder.position import TemporalShift
from evl_cache.heads.decoder.running_mean import RunningMean
from evl_cache.heads.decoder.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """grid: (Hp, Wp). epsilon: of the norm. sums: dtype of everything added up; products: of large products.

    keep: whether there will be a backward pass. workspace: where large memory comes from.
    """

    grid: tuple[int, int]
    epsilon: float
    device: torch.device
    sums: torch.dtype
    products: torch.dtype
    keep: bool
    workspace: Workspace


class Kept(NamedTuple):
    """What the backward pass needs, tokens in the order of the walk.

    mean: (B, H, C), the result. normed: (tokens of kept chunks, T, B, C), normalised, in the dtype of products.
    scale: (N, T, B, 1), one over tokens' deviations before the norm. logits: (B, H, N T).
    log_total: (B, H, 1), the logarithm of the sum of all exponentials.
    """

    mean: Tensor
    normed: Tensor
    scale: Tensor
    logits: Tensor
    log_total: Tensor


class LayerPass:
    """The clips' inputs, and the pass forward.

    tensors: query (B, H, C), tokens, affine, token_scale (as in TokenBlock), maps, row_max (as in MapBlock),
    taps, shift (as in TemporalShift), and both motion tables, flipped, (R, C).
    """

    def __init__(self, setting: Setting, tensors: Sequence[Tensor | None]) -> None:
        query, tokens, affine, token_scale, maps, row_max, taps, shift, prev, following = tensors
        assert query is not None and tokens is not None
        self.setting, self.query = setting, query
        self.tokens = TokenBlock(tokens=tokens, affine=affine, token_scale=token_scale)
        self.shift = TemporalShift(taps, shift)
        clips, frames, self.count, width = tokens.shape
        self.chunk_shape = (frames, clips, width)
        bytes_per_token = frames * clips * width * setting.sums.itemsize
        self.chunks = list(walk(setting.grid, bytes_per_token, query.device))
        self.largest = max(chunk.size for chunk in self.chunks)
        self.motion: Motion | None = None
        if maps is not None and prev is not None and following is not None:
            shape = (2, self.largest, frames - 1, clips, self.count - 1)
            space = setting.workspace.take(shape, setting.products, query.device)
            block = MapBlock(maps=maps, row_max=row_max)
            self.motion = Motion(block, (prev, following), setting.grid, space)

    def forward(self) -> Kept:
        """The weighted mean, and all else that the backward pass needs (`normed` is empty unless kept)."""
        frames, clips, width = self.chunk_shape
        sums, products = self.setting.sums, self.setting.products
        query = self.query.to(products)
        tokens_kept = max(chunk.kept.stop for chunk in self.chunks if chunk.kept is not None)
        empty = self.query.new_empty(0, *self.chunk_shape, dtype=products)
        normed = self.space(tokens_kept, products) if self.setting.keep else empty
        scale = self.query.new_empty(self.count, frames, clips, 1)
        logits = self.query.new_empty(clips, query.shape[1], self.count * frames)
        tokens, positioned = self.space(self.largest, sums), self.space(self.largest, sums)
        mean = RunningMean(self.query)
        for chunk in self.chunks:
            z = self.centred(chunk, tokens, positioned)  # (Q,T,B,C)
            norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
            scale[chunk.order] = norm.square_().div_(width).add_(self.setting.epsilon).rsqrt_()
            kept = self.setting.keep and chunk.kept is not None
            unit = torch.mul(z, scale[chunk.order], out=normed[chunk.kept] if kept else z)
            tokens_by_clip = by_clip(unit.to(products))  # (B,K,C)
            chunk_logits = torch.bmm(query, tokens_by_clip.transpose(1, 2)).to(sums)  # (B,H,K)
            logits[:, :, self.place(chunk)] = chunk_logits
            mean.add(chunk_logits, tokens_by_clip)
        self.give_back(tokens, positioned)
        return Kept(mean=mean.mean(), normed=normed, scale=scale, logits=logits, log_total=mean.log_total())

    def space(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many tokens in all frames and clips: (tokens, T, B, C)."""
        return self.setting.workspace.take((tokens, *self.chunk_shape), dtype, self.query.device)

    def give_back(self, *used: Tensor) -> None:
        """Return memory from `space`, and that of the motion. Nothing may be computed after."""
        self.setting.workspace.give_back(*used)
        if self.motion is not None:
            self.setting.workspace.give_back(self.motion.space)

    def place(self, chunk: Chunk) -> slice:
        """Where the chunk's K tokens lie in (B, H, N T)."""
        return slice(chunk.order.start * self.chunk_shape[0], chunk.order.stop * self.chunk_shape[0])

    def centred(self, chunk: Chunk, tokens: Tensor, out: Tensor) -> Tensor:
        """The chunk's tokens with position, less their mean over channels, (Q, T, B, C), in `out`.

        The tokens alone are left in `tokens`.
        """
        z = self.shift.apply(self.tokens.load(chunk, tokens[: chunk.size]), out[: chunk.size])
        if self.motion is not None and chunk.column is not None:
            self.motion.add(z, chunk)
        return z.sub_(z.mean(-1, keepdim=True))


def by_clip(chunk: Tensor) -> Tensor:
    """A chunk (Q, T, B, C) as one matrix for each clip: a view (B, K, C)."""
    return chunk.flatten(0, 1).transpose(0, 1)
