"""One query's attention over all tokens of a clip, positions included, in one pass over them as they lie.

B clips, T frames, C channels, H heads, R rows of a motion table.
Source: sections 3.2 and 3.3 of arXiv 2208.03550.

With one query, keys and values need not exist. A logit is `(W n + b) . q`, which is `n . (W^T q)` plus a constant that
the softmax drops, so the query is multiplied by `W^T` once. The mean of the values is the value projection of the mean
token. The same holds for the gain and shift of the norm before them. One large tensor is left, the tokens
`norm(tokens + conv + position + motion)`. They are computed and used chunk by chunk in a processor's cache, and kept for
the backward pass, which never holds a gradient of their size.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evl_cache.heads.decoder.chunked.chunks import slice_sizes
from evl_cache.heads.decoder.chunked.layer_gradients import layer_gradients
from evl_cache.heads.decoder.chunked.layer_pass import Kept, LayerPass
from evl_cache.heads.decoder.chunked.threads import map_in_threads
from evl_cache.heads.decoder.tensors import (
    ClipTensors,
    LayerTensors,
    Setting,
    SharedTensors,
    StoredMaps,
    StoredTokens,
)
from evl_cache.heads.decoder.workspace import Workspace


def setting_for(parameter: Tensor, *, grid: tuple[int, int], epsilon: float, workspace: Workspace) -> Setting:
    """Return the setting of a pass: sums in the parameter's dtype or float32, products in autocast's dtype if it is on."""
    device, dtype = parameter.device.type, parameter.dtype
    sums = torch.promote_types(dtype, torch.float32)
    if torch.is_autocast_enabled(device) and sums == torch.float32:
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

    Returns: (B, H, C) in the dtype of sums, differentiable once in everything floating.
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
    # As plain arguments, since torch differentiates in no others.
    attended: Tensor = _Attend.apply(setting, *clips, *shared)
    return attended


class _Attend(torch.autograd.Function):
    """The pass over all clips, in slices; its inputs are the setting and the fields of `LayerTensors`."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Tensor | None) -> Tensor:
        def run(part: LayerTensors) -> Kept:
            return LayerPass(setting, part).forward()

        inputs = _gathered(tensors)
        assert inputs.clips.tokens is not None
        sizes = slice_sizes(inputs.clips.tokens.shape, setting.device)
        kept = map_in_threads(run, _slices(inputs, sizes), setting.device)
        ctx.setting = setting
        ctx.save_for_backward(*tensors, *(tensor for part in kept for tensor in part))
        return torch.cat([part.mean for part in kept])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        setting, saved = ctx.setting, ctx.saved_tensors
        names = (*ClipTensors._fields, *SharedTensors._fields)
        needed = frozenset(itertools.compress(names, ctx.needs_input_grad[1:]))
        starts = range(len(names), len(saved), len(Kept._fields))
        kept = [Kept(*saved[start : start + len(Kept._fields)]) for start in starts]
        sizes = [len(part.mean) for part in kept]

        def run(part: tuple[LayerTensors, Kept, Tensor]) -> LayerTensors:
            tensors, kept_of_part, gradient_of_part = part
            return layer_gradients(LayerPass(setting, tensors), kept_of_part, gradient_of_part, needed)

        slices = _slices(_gathered(saved[: len(names)]), sizes)
        work = list(zip(slices, kept, torch.split(gradient, sizes), strict=True))
        parts = map_in_threads(run, work, setting.device)
        if not _graph_is_kept():
            setting.workspace.give_back(*(part.normed for part in kept))
        clips = (_joined(torch.cat, found) for found in zip(*(part.clips for part in parts), strict=True))
        shared = (_joined(sum, found) for found in zip(*(part.shared for part in parts), strict=True))
        return None, *clips, *shared


def _gathered(tensors: Sequence[Tensor | None]) -> LayerTensors:
    """Return `LayerTensors` of all its fields, given in order."""
    own = len(ClipTensors._fields)
    return LayerTensors(ClipTensors(*tensors[:own]), SharedTensors(*tensors[own:]))


def _slices(inputs: LayerTensors, sizes: Sequence[int]) -> list[LayerTensors]:
    """Return the inputs of each slice of so many clips; what clips share is in every one."""
    return [
        LayerTensors(
            ClipTensors(*(t if t is None else t[stop - size : stop] for t in inputs.clips)), inputs.shared
        )
        for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]


def _joined(join: Callable[[list[Tensor]], Any], gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return one tensor's gradient from those of all slices, or None where there is none."""
    found = [gradient for gradient in gradients if gradient is not None]
    whole: Tensor | None = join(found) if found else None
    return whole


def _graph_is_kept() -> bool:
    """Whether the backward pass now running was asked to retain the graph; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
