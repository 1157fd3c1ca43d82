"""One query's attention over all tokens of a clip, positions included, in one pass over them as they lie.

B clips, T frames, C channels, H heads, R rows of a motion table.
Source: sections 3.2 and 3.3 of arXiv 2208.03550.

With one query, keys and values need not exist. A logit is `(W n + b) . q`, which is `n . (W^T q)` plus a constant that
the softmax drops, so the query is multiplied by `W^T` once. The mean of the values is the value projection of the mean
token. The same holds for the gain and shift of the norm before them. One large tensor is left, the tokens
`norm(tokens + conv + position + motion)`. `paths.py` says which code computes them on which device.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evl_cache.heads.decoder import differentiable
from evl_cache.heads.decoder.paths import are_closed, path_for
from evl_cache.heads.decoder.products import without_autocast
from evl_cache.heads.decoder.tensors import (
    ClipTensors,
    LayerTensors,
    Setting,
    SharedTensors,
    StoredMaps,
    StoredTokens,
)
from evl_cache.heads.decoder.workspace import Workspace
from evl_cache.heads.tracing import is_many


def setting_for(parameter: Tensor, *, grid: tuple[int, int], epsilon: float, workspace: Workspace) -> Setting:
    """Return the setting of a pass: sums in the parameter's dtype or float32, products in autocast's dtype if it is on."""
    device, dtype = parameter.device.type, parameter.dtype
    sums = torch.promote_types(dtype, torch.float32)
    if device != "meta" and torch.is_autocast_enabled(device) and sums == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    return Setting(
        grid=grid,
        epsilon=epsilon,
        device=parameter.device,
        sums=sums,
        products=dtype,
        keep=torch.is_grad_enabled(),
        workspace=workspace,
    )


def attend(
    query: Tensor, tokens: StoredTokens, maps: StoredMaps | None, shared: SharedTensors, setting: Setting
) -> Tensor:
    """Return the mean of the normalised tokens with position, weighted by softmax(tokens . query), for every head.

    Tokens and maps are not changed, and must not be overwritten before the backward pass.

    Args:
        query: multiplied by the key projection and scaled, (B, H, C).
        tokens: of B clips.
        maps: of B clips; None adds no motion.
        shared: what the temporal modules add to tokens, in the dtype of sums; without tables where `maps` is None.
        setting: of the pass.

    Returns: (B, H, C) in the dtype of sums, differentiable in everything floating.
    """
    query = query.to(setting.sums)
    # Normalised tokens have mean zero over channels, so the query's mean has no effect on logits.
    query = query - query.mean(-1, keepdim=True)
    clips = ClipTensors(
        query=query,
        tokens=tokens.tokens,
        affine=tokens.affine,
        token_scale=tokens.token_scale,
        maps=None if maps is None else maps.maps,
        row_max=None if maps is None else maps.row_max,
    )
    if are_closed(setting, LayerTensors(clips, shared)):
        return differentiable.attended(setting, LayerTensors(clips, shared))
    # As plain arguments, since torch differentiates in no others.
    attended: Tensor = _Attend.apply(setting, *clips, *shared)
    return attended


class _Attend(torch.autograd.Function):
    """The pass over all clips; its inputs are the setting and the fields of `LayerTensors`."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Tensor | None) -> Tensor:
        inputs = _gathered(tensors)
        path = path_for(setting, inputs)
        with without_autocast(setting.device):
            mean, kept = path.forward(setting, inputs)
        ctx.setting, ctx.path = setting, path
        ctx.save_for_backward(*tensors, *kept)
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, names = ctx.saved_tensors, (*ClipTensors._fields, *SharedTensors._fields)
        needed = frozenset(itertools.compress(names, ctx.needs_input_grad[1:]))
        inputs, kept = _gathered(saved[: len(names)]), saved[len(names) :]
        if torch.is_grad_enabled() or is_many(gradient):  # a gradient to be differentiated, or many at once
            return None, *itertools.chain(*differentiable.gradients(ctx.setting, inputs, gradient, needed))
        with without_autocast(ctx.setting.device):
            found = ctx.path.backward(ctx.setting, inputs, kept, gradient, needed, again=_graph_is_kept())
        return None, *found.clips, *found.shared


def _gathered(tensors: Sequence[Tensor | None]) -> LayerTensors:
    """Return `LayerTensors` of all its fields, given in order."""
    own = len(ClipTensors._fields)
    return LayerTensors(ClipTensors(*tensors[:own]), SharedTensors(*tensors[own:]))


def _graph_is_kept() -> bool:
    """Whether the backward pass now running was asked to retain the graph; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
