"""The attention of one decoder layer on whole tensors, forward and backward.

B clips, T frames, P patches, N = 1+P tokens of a frame, C channels, H heads, K = N T tokens of a clip. Tokens lie as
(N, T, B, C), so that a query patch's rows of all frames and clips are one matrix. `chunked/layer_gradients.py` has the
maths of the backward pass.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evl_cache.heads.decoder.position import TemporalShift
from evl_cache.heads.decoder.products import product
from evl_cache.heads.decoder.tensors import (
    ClipTensors,
    LayerTensors,
    Setting,
    SharedTensors,
    joined,
    slices_of,
)
from evl_cache.heads.decoder.whole.motion import WholeMotion

# Of the tokens of a slice in the dtype of sums: 277 clips of ViT-B/16 with 8 frames. A pass needs about four times as much.
SLICE_BYTES = 1280 << 20


class Kept(NamedTuple):
    """What the backward pass needs.

    Attributes:
        mean: the result, (B, H, C).
        unit: normalised tokens in the dtype of products, (N, T, B, C).
        scale: one over tokens' deviations before the norm, (N, T, B, 1).
        logits: (B, H, K).
        weights: their softmax, (B, H, K).
    """

    mean: Tensor
    unit: Tensor
    scale: Tensor
    logits: Tensor
    weights: Tensor


def forward(setting: Setting, inputs: LayerTensors) -> tuple[Tensor, Sequence[Tensor]]:
    """See `paths.AttentionPath`."""
    means, kept = list[Tensor](), list[Tensor]()
    for part in slices_of(inputs, _sizes(setting, inputs)):
        found = _WholePass(setting, part).forward()
        means.append(found.mean)
        kept += found if setting.keep else ()
    return means[0] if len(means) == 1 else torch.cat(means), kept


def backward(
    setting: Setting,
    inputs: LayerTensors,
    kept: Sequence[Tensor],
    gradient: Tensor,
    needed: frozenset[str],
    *,
    again: bool,
) -> LayerTensors:
    """See `paths.AttentionPath`."""
    each, sizes = len(Kept._fields), _sizes(setting, inputs)
    parts = [Kept(*kept[start : start + each]) for start in range(0, len(kept), each)]
    work = zip(slices_of(inputs, sizes), parts, torch.split(gradient, sizes), strict=True)
    return joined([_WholePass(setting, part).backward(k, g, needed) for part, k, g in work])


def _sizes(setting: Setting, inputs: LayerTensors) -> list[int]:
    """Return how many clips each slice has, as equal as possible."""
    assert inputs.clips.tokens is not None
    clips, *of_clip = inputs.clips.tokens.shape
    nbytes = torch.Size((clips, *of_clip)).numel() * setting.sums.itemsize
    slices = min(clips, -(-nbytes // SLICE_BYTES))
    bounds = [clips * i // slices for i in range(slices + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


class _WholePass:
    """One pass over a slice of clips.

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
        self.motion: WholeMotion | None = None
        if maps is not None and shared.table_prev is not None and shared.table_next is not None:
            tables = (shared.table_prev, shared.table_next)
            self.motion = WholeMotion(maps, tables, setting.grid, setting.products)

    def forward(self) -> Kept:
        """Return the weighted mean, and what else the backward pass needs."""
        sums, products = self.setting.sums, self.setting.products
        positioned = self._positioned()
        unit, _, scale = torch.native_layer_norm(
            positioned, positioned.shape[-1:], None, None, self.setting.epsilon
        )
        del positioned
        unit = unit.to(products)
        tokens = _by_clip(unit)  # (B,K,C)
        logits = product(self.query.to(products), tokens.transpose(1, 2), sums)  # (B,H,K)
        weights = torch.softmax(logits, -1)
        mean = product(weights.to(products), tokens, sums)
        return Kept(mean=mean, unit=unit, scale=scale, logits=logits, weights=weights)

    def backward(self, kept: Kept, gradient: Tensor, needed: frozenset[str]) -> LayerTensors:
        """Return the gradients of the inputs. Arguments as `paths.AttentionPath`."""
        sums, products, heads = self.setting.sums, self.setting.products, self.query.shape[1]
        gradient = gradient.to(sums)
        ends = torch.cat([self.query, gradient - gradient.mean(-1, keepdim=True)], 1).to(products)  # (B,2H,C)
        tokens = _by_clip(kept.unit)
        weight_gradient = product(ends[:, heads:], tokens.transpose(1, 2), sums)  # (B,H,K)
        # Of the rounded products, so that a head's logit gradients sum to zero: what is left over would be multiplied by
        # what all tokens have in common, which may be sixty times as large as what tells them apart.
        expected = (kept.weights * weight_gradient).sum(-1, keepdim=True)  # (B,H,1)
        logit_gradient = kept.weights * (weight_gradient - expected)
        query_gradient = product(logit_gradient.to(products), tokens, sums)
        shared = SharedTensors(None, None, None, None)
        clips = ClipTensors(query=query_gradient)
        if needed & {"tokens", "maps", *SharedTensors._fields}:
            along = (logit_gradient * kept.logits + kept.weights * weight_gradient).sum(1)  # (B,K)
            factors = torch.cat([logit_gradient, kept.weights], 1)  # (B,2H,K)
            back = self._through_norm(kept, factors, ends, along)
            clips, shared = self._input_gradients(back, query_gradient, needed)
        return LayerTensors(clips, shared)

    def _positioned(self) -> Tensor:
        """Return the decoded tokens with position, (N, T, B, C)."""
        tokens = self._load()
        positioned = self.shift.apply(tokens, torch.empty_like(tokens))
        if self.motion is not None:
            self.motion.add(positioned[1:])
        return positioned

    def _load(self) -> Tensor:
        clips, frames, count, width = self.tokens.tokens.shape
        shape = (count, frames, clips, width)
        return self.tokens.load(slice(None), self.query.new_empty(shape, dtype=self.setting.sums))

    def _through_norm(self, kept: Kept, factors: Tensor, ends: Tensor, along: Tensor) -> Tensor:
        """Return the gradient (N, T, B, C) of the tokens before the norm; see `chunked/layer_gradients.py`.

        Args:
            factors: (B, 2H, K).
            ends: (B, 2H, C), with mean zero over C.
            along: the product of each normalised token with its gradient, (B, K).
        """
        scale = _by_clip(kept.scale)  # (B,K,1)
        factors = (factors.transpose(1, 2) * scale).to(ends.dtype)  # (B,K,2H)
        back = torch.empty_like(kept.unit, dtype=self.setting.sums)
        product(factors, ends, self.setting.sums, out=_by_clip(back))
        projection = (along[..., None] * scale / -kept.unit.shape[-1]).transpose(0, 1)  # (K,B,1)
        return back.addcmul_(kept.unit, projection.view(kept.scale.shape))

    def _input_gradients(
        self, back: Tensor, query: Tensor, needed: frozenset[str]
    ) -> tuple[ClipTensors, SharedTensors]:
        """Return all gradients from that of the tokens before the norm, `back` (N, T, B, C)."""
        tables: tuple[Tensor | None, Tensor | None] = (None, None)
        maps: Tensor | None = None
        if self.motion is not None:
            of_patches = back[1:].to(self.setting.products)
            if needed & {"table_prev", "table_next"}:
                tables = self.motion.table_gradients(of_patches)
            if "maps" in needed:
                maps = self.motion.map_gradients(of_patches)
            del of_patches
        if self.shift.taps is None:
            self.shift.collect(back, None, back)
        else:
            self.shift.collect(back, self._load(), torch.empty_like(back))
        tokens = self.shift.to_tokens(back).permute(2, 1, 0, 3) if "tokens" in needed else None
        shared = SharedTensors(self.shift.taps_gradient, self.shift.shift_gradient, *tables)
        return ClipTensors(query=query, tokens=tokens, maps=maps), shared


def _by_clip(tokens: Tensor) -> Tensor:
    """Return tokens (N, T, B, C) as one matrix for each clip, a view (B, K, C)."""
    return tokens.flatten(0, 1).transpose(0, 1)
