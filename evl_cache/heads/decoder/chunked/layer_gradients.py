"""The backward pass of one decoder layer over the tokens of some clips.

B clips, T frames, P patches, N = 1+P tokens of a frame, C channels, H heads, Q tokens of a chunk, K = Q T
tokens of a chunk in all frames.

Let n be a normalised token and r one over its deviation. For head h, let p_h be its weight, q_h the query and g_h the
gradient of the mean. Then the logit's gradient is d_h = p_h (g_h . n - g_h . mean_h). If q_h and g_h have mean zero over
channels, the gradient of the token before norm is r (sum_h (d_h q_h + p_h g_h) - n sum_h (d_h q_h . n + p_h g_h . n) / C).
So a chunk's gradient is one product of two small matrices, which stays in a processor's cache.
"""

import torch
from torch import Tensor

from evl_cache.heads.decoder.chunked.chunks import Chunk
from evl_cache.heads.decoder.chunked.layer_pass import Kept, LayerPass, by_clip
from evl_cache.heads.decoder.chunked.running_mean import add_products
from evl_cache.heads.decoder.products import product
from evl_cache.heads.decoder.tensors import ClipTensors, LayerTensors, SharedTensors

# The inputs whose gradients come through the norm of the tokens.
_THROUGH_NORM = frozenset({"tokens", "maps", *SharedTensors._fields})


def layer_gradients(work: LayerPass, kept: Kept, gradient: Tensor, needed: frozenset[str]) -> LayerTensors:
    """Return the gradients of the tensors of `work`; None where there is none or it is not needed.

    Args:
        work: a pass over the same clips.
        kept: what its forward pass returned; it is only read.
        gradient: of the mean, (B, H, C).
        needed: fields of `LayerTensors` whose gradients are needed.
    """
    sums, products, heads = work.setting.sums, work.setting.products, work.query.shape[1]
    gradient = gradient.to(sums)
    expected = (gradient * kept.mean).sum(-1, keepdim=True)  # (B,H,1)
    ends = torch.cat([work.query, gradient - gradient.mean(-1, keepdim=True)], 1).to(products)  # (B,2H,C)
    query_gradient, space = torch.zeros_like(work.query), torch.empty_like(work.query)
    inputs = _InputGradients(work, needed)
    for chunk in work.chunks:
        unit = inputs.unit(chunk, kept)  # (Q,T,B,C)
        logits = kept.logits[:, :, work.place(chunk)]  # (B,H,K)
        weights = torch.exp(logits - kept.log_total)
        weight_gradient = product(ends[:, heads:], by_clip(unit).transpose(1, 2), sums)
        logit_gradient = weights * (weight_gradient - expected)
        add_products(query_gradient, logit_gradient, by_clip(unit), space)
        if inputs.wanted:
            along = (logit_gradient * logits + weights * weight_gradient).sum(1)  # (B,K)
            factors = torch.cat([logit_gradient, weights], 1)  # (B,2H,K)
            back = inputs.through_norm(unit, kept.scale[chunk.order], factors, ends, along)
            inputs.add(chunk, back)
    work.give_back(*inputs.spaces)
    return inputs.result(query_gradient)


class _InputGradients:
    """The gradients of all inputs that make the normalised tokens, added up chunk by chunk."""

    def __init__(self, work: LayerPass, needed: frozenset[str]) -> None:
        self.work, self.wanted = work, bool(needed & _THROUGH_NORM)
        self.tables_wanted = bool(needed & {"table_prev", "table_next"})
        self.tokens = torch.empty_like(work.tokens.tokens) if "tokens" in needed else None
        self.maps: Tensor | None = None
        if work.motion is not None and "maps" in needed:
            self.maps = torch.empty_like(work.motion.maps.maps)
        self.spaces = [work.space(work.largest, work.setting.sums) for _ in range(4)]

    def unit(self, chunk: Chunk, kept: Kept) -> Tensor:
        """Return the chunk's normalised tokens (Q, T, B, C) in the dtype of products, kept or computed again."""
        work = self.work
        if chunk.kept is not None:
            if self.wanted and work.shift.taps is not None:
                work.tokens.load(chunk.tokens, self.spaces[1][: chunk.size])
            return kept.normed[chunk.kept]
        again = work.centred(chunk, self.spaces[1], self.spaces[3])
        return again.mul_(kept.scale[chunk.order]).to(work.setting.products)

    def through_norm(
        self, unit: Tensor, scale: Tensor, factors: Tensor, ends: Tensor, along: Tensor
    ) -> Tensor:
        """Return the gradient (Q, T, B, C) of a chunk's tokens before the norm, in memory of this object.

        The gradient of its normalised tokens is factors^T ends.

        Args:
            unit: the normalised tokens, (Q, T, B, C).
            scale: one over the tokens' deviations, (Q, T, B, 1).
            factors: (B, 2H, K).
            ends: (B, 2H, C), with mean zero over C.
            along: the product of each normalised token with its gradient, (B, K).
        """
        back, _, space, _ = (s[: len(unit)] for s in self.spaces)
        scale = scale.flatten(0, 1)[..., 0].t()  # (B,K)
        projection = (along * scale / -unit.shape[-1]).t()[..., None]  # (K,B,1)
        factors = (factors * scale[:, None]).transpose(1, 2).to(ends.dtype)  # (B,K,2H)
        shape = (*factors.shape[:2], unit.shape[-1])  # (B,K,C)
        across = space.view(shape) if space.dtype == ends.dtype else ends.new_empty(shape)
        torch.bmm(factors, ends, out=across)
        torch.addcmul(across.transpose(0, 1), unit.flatten(0, 1), projection, out=back.flatten(0, 1))
        return back

    def add(self, chunk: Chunk, back: Tensor) -> None:
        """Add the gradient `back` (Q, T, B, C) of a chunk's tokens with position to all inputs'; call `unit` before."""
        work = self.work
        _, tokens, space, _ = (s[: len(back)] for s in self.spaces)
        work.shift.collect(back, tokens, space)
        if work.motion is not None and chunk.column is not None:
            if self.tables_wanted:
                work.motion.collect(back, chunk)
            if self.maps is not None:
                work.motion.collect_maps(back, chunk, self.maps)
        if self.tokens is not None:
            self.tokens[:, :, chunk.tokens] = work.shift.to_tokens(back).permute(2, 1, 0, 3)

    def result(self, query: Tensor) -> LayerTensors:
        """Return all gradients, that of the query included."""
        shift, motion = self.work.shift, self.work.motion
        tables = motion.finish() if motion is not None and self.tables_wanted else (None, None)
        return LayerTensors(
            ClipTensors(query=query, tokens=self.tokens, maps=self.maps),
            SharedTensors(shift.taps_gradient, shift.shift_gradient, *tables),
        )
