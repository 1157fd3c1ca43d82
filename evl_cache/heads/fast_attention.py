"""One query's attention over all tokens of a clip, positions included, in one pass over them as they lie.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, H heads, Q tokens of a
chunk, K = Q T tokens of a chunk in all frames, R rows of a motion table.
Source: sections 3.2 and 3.3 of arXiv 2208.03550; why it is the same function: docs/architecture.md.

With one query, keys and values need not exist. A logit is `(W n + b) . q`, so the query can be carried to the
tokens instead: `n . (W^T q)` plus a constant that the softmax drops; and the mean of values is the value
projection of the mean token. The same holds for the gain and shift of the norm before them. So one large
thing is left, the tokens `norm(tokens + conv + position + motion)`: made chunk by chunk in a processor's
cache, used there, and kept for the backward pass, where no gradient of their size ever exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evl_cache.heads.chunks import Chunk, TokenBlock, clips_at_once, walk
from evl_cache.heads.motion import MapBlock, Motion
from evl_cache.heads.position import TemporalShift
from evl_cache.heads.running_mean import RunningMean, add_products
from evl_cache.heads.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """grid: (Hp, Wp). epsilon: of the norm. sums: dtype of everything added up; products: of large products.

    keep: whether there will be a backward pass. workspace: where large memory comes from.
    """

    grid: tuple[int, int]
    epsilon: float
    sums: torch.dtype
    products: torch.dtype
    keep: bool
    workspace: Workspace


@dataclass(frozen=True, kw_only=True)
class Position:
    """What the temporal modules add to tokens, in the dtype of sums; None for one that is switched off.

    taps: (3, C) of the depthwise convolution, earliest frame first. shift: (T, C), the position embedding
    plus the convolution's bias; not None where taps is not. tables: of motion prev and next, (R, C), flipped.
    """

    taps: Tensor | None
    shift: Tensor | None
    tables: tuple[Tensor, Tensor] | None


def setting_for(parameter: Tensor, *, grid: tuple[int, int], epsilon: float, workspace: Workspace) -> Setting:
    """Sums in the parameter's dtype, float32 at least; products in autocast's where it is on."""
    device, dtype = parameter.device.type, parameter.dtype
    sums = torch.promote_types(dtype, torch.float32)
    if torch.is_autocast_enabled(device) and sums == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    keep = torch.is_grad_enabled()
    return Setting(grid=grid, epsilon=epsilon, sums=sums, products=dtype, keep=keep, workspace=workspace)


def attend(
    query: Tensor, tokens: TokenBlock, maps: MapBlock | None, position: Position, setting: Setting
) -> Tensor:
    """Mean of the normalised tokens with position, weighted by softmax(tokens . query), for every head.

    Args:
        query: (B, H, C), carried to the tokens and scaled.
        tokens, maps: of B clips. They are not changed, and must not be overwritten before the backward pass.
            maps is None where there is no motion.
        position: what is added to the tokens.

    Returns: (B, H, C) in the dtype of sums. Differentiable once, in everything floating.
    """
    query = query.to(setting.sums)
    # Normalised tokens have mean zero over channels: what the query has of a mean says nothing.
    query = query - query.mean(-1, keepdim=True)
    tables = (None, None) if maps is None or position.tables is None else position.tables
    step = clips_at_once(tokens.tokens.shape[1], query.device)
    attended: list[Tensor] = []
    for start in range(0, max(len(query), 1), step):
        clips = slice(start, start + step)
        inputs = [query, tokens.tokens, tokens.affine, tokens.token_scale]
        inputs += [None, None] if maps is None else [maps.maps, maps.row_max]
        parts = [None if whole is None else whole[clips] for whole in inputs]
        attended.append(_Attend.apply(setting, *parts, position.taps, position.shift, *tables))
    return torch.cat(attended)


class _Attend(torch.autograd.Function):
    """Inputs: the setting, then the tensors of `_Pass` in its order."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Tensor | None) -> Tensor:
        work = _Pass(setting, tensors)
        with torch.autocast(work.query.device.type, enabled=False):
            mean, kept = work.forward()
        ctx.setting = setting
        ctx.save_for_backward(*tensors, mean, *kept)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mean, normed, scale, logits, log_total = ctx.saved_tensors
        work = _Pass(ctx.setting, tensors)
        with torch.autocast(gradient.device.type, enabled=False):
            kept = _Kept(normed=normed, scale=scale, logits=logits, log_total=log_total)
            return None, *work.backward(gradient, mean, kept, ctx.needs_input_grad[1:])


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """From the pass forward, tokens in the order of the walk.

    normed: (N, T, B, C), normalised tokens. scale: (N, T, B, 1), one over their deviations before.
    logits: (B, H, N T). log_total: (B, H, 1), logarithm of the sum of all exponentials.
    """

    normed: Tensor
    scale: Tensor
    logits: Tensor
    log_total: Tensor


class _Pass:
    """One layer's pass over some clips that are taken together.

    tensors: query (B, H, C), tokens, affine, token_scale (as in TokenBlock), maps, row_max (as in MapBlock),
    taps, shift, and both tables (as in Position).
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
        self.largest = max(c.order.stop - c.order.start for c in self.chunks)
        self.motion: Motion | None = None
        if maps is not None and prev is not None and following is not None:
            shape = (self.largest, frames - 1, clips, self.count - 1)
            space = setting.workspace.take(shape, setting.products, query.device)
            block = MapBlock(maps=maps, row_max=row_max)
            self.motion = Motion(block, (prev, following), setting.grid, space)

    def forward(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The weighted mean (B, H, C), and the fields of `_Kept` (normed is empty unless kept)."""
        frames, clips, width = self.chunk_shape
        sums, products = self.setting.sums, self.setting.products
        query = self.query.to(products)
        normed = self.space(self.count if self.setting.keep else 0, products)
        scale = self.query.new_empty(self.count, frames, clips, 1)
        logits = self.query.new_empty(clips, query.shape[1], self.count * frames)
        tokens, positioned = self.space(self.largest, sums), self.space(self.largest, sums)
        mean = RunningMean(self.query)
        for chunk in self.chunks:
            z = self._positioned(chunk, tokens, positioned)  # (Q,T,B,C)
            z.sub_(z.mean(-1, keepdim=True))
            norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
            scale[chunk.order] = norm.square_().div_(width).add_(self.setting.epsilon).rsqrt_()
            unit = normed[chunk.order] if self.setting.keep else z
            torch.mul(z, scale[chunk.order], out=unit)
            by_clip = _by_clip(unit).to(products)  # (B,K,C)
            chunk_logits = torch.bmm(query, by_clip.transpose(1, 2)).to(sums)  # (B,H,K)
            logits[:, :, self._place(chunk)] = chunk_logits
            mean.add(chunk_logits, by_clip)
        self.give_back(tokens, positioned)
        return mean.mean(), (normed, scale, logits, mean.log_total())

    def backward(
        self, gradient: Tensor, mean: Tensor, kept: _Kept, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors, in their order; None for those that are not needed.

        gradient: of the mean (B, H, C).
        """
        sums, products, heads = self.setting.sums, self.setting.products, self.query.shape[1]
        gradient = gradient.to(sums)
        expected = (gradient * mean).sum(-1, keepdim=True)  # (B,H,1)
        # Normalised tokens have mean zero: so has their gradient, once the mean is taken from its factors.
        ends = torch.cat([self.query, gradient - gradient.mean(-1, keepdim=True)], 1).to(products)  # (B,2H,C)
        query_gradient, space = torch.zeros_like(self.query), torch.empty_like(self.query)
        inputs = _InputGradients(self, needed)
        for chunk in self.chunks:
            unit = kept.normed[chunk.order]  # (Q,T,B,C)
            by_clip = _by_clip(unit)  # (B,K,C)
            logits = kept.logits[:, :, self._place(chunk)]  # (B,H,K)
            weights = torch.exp(logits - kept.log_total)
            weight_gradient = torch.bmm(ends[:, heads:], by_clip.transpose(1, 2)).to(sums)
            logit_gradient = weights * (weight_gradient - expected)
            add_products(query_gradient, logit_gradient, by_clip, space)
            if inputs.wanted:
                scale = kept.scale[chunk.order]
                along = (logit_gradient * logits + weights * weight_gradient).sum(1)  # (B,K)
                factors = torch.cat([logit_gradient, weights], 1)  # (B,2H,K)
                inputs.add(chunk, unit, scale, factors, ends, along)
        self.give_back(*inputs.spaces, kept.normed)
        return query_gradient, *inputs.result()

    def _positioned(self, chunk: Chunk, tokens: Tensor, out: Tensor) -> Tensor:
        """The chunk's tokens with all positions, (Q, T, B, C), in `out`; `tokens` is overwritten."""
        size = chunk.order.stop - chunk.order.start
        z = self.shift.apply(self.tokens.load(chunk, tokens[:size]), out[:size])
        if self.motion is not None and chunk.column is not None:
            self.motion.add(z, chunk)
        return z

    def space(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many tokens in all frames and clips: (tokens, T, B, C)."""
        return self.setting.workspace.take((tokens, *self.chunk_shape), dtype, self.query.device)

    def give_back(self, *used: Tensor) -> None:
        """Return memory from `space`, and that of the motion. Nothing may be computed after."""
        self.setting.workspace.give_back(*used)
        if self.motion is not None:
            self.setting.workspace.give_back(self.motion.space)

    def _place(self, chunk: Chunk) -> slice:
        """Where the chunk's K tokens lie in (B, H, N T)."""
        return slice(chunk.order.start * self.chunk_shape[0], chunk.order.stop * self.chunk_shape[0])


class _InputGradients:
    """Gradients of all that the normalised tokens were made of, added up chunk by chunk."""

    def __init__(self, work: _Pass, needed: Sequence[bool]) -> None:
        _, tokens, _, _, maps, _, taps, shift, prev, following = needed
        self.wanted = tokens or maps or taps or shift or prev or following
        self.work, self.tables_wanted = work, prev or following
        self.tokens = torch.empty_like(work.tokens.tokens) if tokens else None
        self.maps = torch.empty_like(work.motion.maps.maps) if maps and work.motion is not None else None
        self.spaces = [work.space(work.largest, work.setting.sums) for _ in range(3 if self.wanted else 0)]

    def add(
        self, chunk: Chunk, unit: Tensor, scale: Tensor, factors: Tensor, ends: Tensor, along: Tensor
    ) -> None:
        """Add one chunk's.

        The gradient of its normalised tokens is factors^T ends. unit: these tokens (Q, T, B, C); scale: one
        over their deviation (Q, T, B, 1); factors: (B, 2H, K); ends: (B, 2H, C), of mean zero;
        along: (B, K), the product of each normalised token with its gradient.
        """
        work, size = self.work, unit.shape[0]
        back, tokens, space = (s[:size] for s in self.spaces)
        scale = scale.flatten(0, 1)[..., 0].t()  # (B,K)
        projection = (along * scale / -unit.shape[-1]).t()[..., None]  # (K,B,1)
        factors = (factors * scale[:, None]).transpose(1, 2).to(ends.dtype)
        shape = (*factors.shape[:2], unit.shape[-1])  # (B,K,C)
        across = space.view(shape) if space.dtype == ends.dtype else ends.new_empty(shape)
        torch.bmm(factors, ends, out=across)
        torch.addcmul(across.transpose(0, 1), unit.flatten(0, 1), projection, out=back.flatten(0, 1))
        if work.shift.taps is not None:
            work.tokens.load(chunk, tokens)
        work.shift.collect(back, tokens, space)
        if work.motion is not None and chunk.column is not None:
            if self.tables_wanted:
                work.motion.collect(back, chunk)
            if self.maps is not None:
                work.motion.collect_maps(back, chunk, self.maps)
        if self.tokens is not None:
            self.tokens[:, :, chunk.tokens] = work.shift.to_tokens(back).permute(2, 1, 0, 3)

    def result(self) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors of `_Pass` from the tokens on."""
        shift, motion = self.work.shift, self.work.motion
        tables = motion.finish() if motion is not None and self.tables_wanted else (None, None)
        return self.tokens, None, None, self.maps, None, shift.taps_gradient, shift.shift_gradient, *tables


def _by_clip(chunk: Tensor) -> Tensor:
    """A chunk (Q, T, B, C) as one matrix for each clip: a view (B, K, C)."""
    return chunk.flatten(0, 1).transpose(0, 1)
