"""The forward pass of one decoder layer over the tokens of some clips: positions, norm, softmax, weighted mean.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, H heads, Q tokens of a
chunk, K = Q T tokens of a chunk in all frames, R rows of a motion table.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evl_cache.heads.decoder.chunked.chunks import Chunk, walk
from evl_cache.heads.decoder.chunked.motion import Motion
from evl_cache.heads.decoder.chunked.running_mean import RunningMean
from evl_cache.heads.decoder.position import TemporalShift
from evl_cache.heads.decoder.products import product
from evl_cache.heads.decoder.tensors import LayerTensors, Setting


class Kept(NamedTuple):
    """What the backward pass needs, with tokens in the order of the walk.

    Attributes:
        mean: the result, (B, H, C).
        normed: normalised tokens of kept chunks in the dtype of products, (tokens, T, B, C).
        scale: one over tokens' deviations before the norm, (N, T, B, 1).
        logits: (B, H, N T).
        log_total: logarithm of the sum of all exponentials, (B, H, 1).
    """

    mean: Tensor
    normed: Tensor
    scale: Tensor
    logits: Tensor
    log_total: Tensor


class LayerPass:
    """One pass over a slice of clips: its inputs, and the forward pass.

    Args:
        setting: how it is computed.
        tensors: its inputs; query and tokens are not None.
    """

    def __init__(self, setting: Setting, tensors: LayerTensors) -> None:
        clip, shared = tensors
        assert clip.query is not None and clip.tokens is not None
        self.setting, self.query = setting, clip.query
        self.tokens, maps = clip.stored_tokens(), clip.stored_maps()
        self.shift = TemporalShift(shared.taps, shared.shift)
        clips, frames, self.count, width = clip.tokens.shape
        self.chunk_shape = (frames, clips, width)
        bytes_per_token = frames * clips * width * setting.sums.itemsize
        self.chunks = list(walk(setting.grid, bytes_per_token))
        self.largest = max(chunk.size for chunk in self.chunks)
        self.motion: Motion | None = None
        if maps is not None and shared.table_prev is not None and shared.table_next is not None:
            shape = (2, self.largest, frames - 1, clips, self.count - 1)
            space = setting.workspace.take(shape, setting.products, self.query.device)
            self.motion = Motion(maps, (shared.table_prev, shared.table_next), setting.grid, space)

    def forward(self) -> Kept:
        """Return the weighted mean, and what else the backward pass needs; `normed` is empty unless `keep` is set."""
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
            chunk_logits = product(query, tokens_by_clip.transpose(1, 2), sums)  # (B,H,K)
            logits[:, :, self.place(chunk)] = chunk_logits
            mean.add(chunk_logits, tokens_by_clip)
        self.give_back(tokens, positioned)
        return Kept(mean=mean.mean(), normed=normed, scale=scale, logits=logits, log_total=mean.log_total())

    def space(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Return memory for so many tokens in all frames and clips, (tokens, T, B, C)."""
        return self.setting.workspace.take((tokens, *self.chunk_shape), dtype, self.query.device)

    def give_back(self, *used: Tensor) -> None:
        """Give memory from `space` and that of the motion back. Nothing may be computed after."""
        self.setting.workspace.give_back(*used)
        if self.motion is not None:
            self.setting.workspace.give_back(self.motion.space)

    def place(self, chunk: Chunk) -> slice:
        """Return where the chunk's K tokens are in (B, H, N T)."""
        return slice(chunk.order.start * self.chunk_shape[0], chunk.order.stop * self.chunk_shape[0])

    def centred(self, chunk: Chunk, tokens: Tensor, out: Tensor) -> Tensor:
        """Write the chunk's tokens with position, less their mean over channels, into `out`, and return it.

        The tokens without position are left in `tokens`. All are (Q, T, B, C).
        """
        z = self.shift.apply(self.tokens.load(chunk.tokens, tokens[: chunk.size]), out[: chunk.size])
        if self.motion is not None and chunk.column is not None:
            self.motion.add(z, chunk)
        return z.sub_(z.mean(-1, keepdim=True))


def by_clip(chunk: Tensor) -> Tensor:
    """Return a chunk (Q, T, B, C) as one matrix for each clip, a view (B, K, C)."""
    return chunk.flatten(0, 1).transpose(0, 1)
