"""The attention of one decoder layer in torch's own differentiable operations, none of them in place.

`torch.compile`, `torch.export`, transforms of `torch.func` and second derivatives follow these; the faster paths are closed
to them. B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, H heads, K = T N tokens of a clip,
R rows of a motion table.
Source: section 3.3 of arXiv 2208.03550.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evl_cache.heads.decoder.products import without_autocast
from evl_cache.heads.decoder.tensors import (
    ClipTensors,
    LayerTensors,
    Setting,
    SharedTensors,
    StoredMaps,
    StoredTokens,
)


def attended(setting: Setting, inputs: LayerTensors) -> Tensor:
    """Return the mean (B, H, C) in the dtype of sums, as an `AttentionPath` does."""
    query, sums = inputs.clips.query, setting.sums
    assert query is not None
    with without_autocast(setting.device):
        y = _positioned(setting, inputs)  # (B,T,N,C)
        unit = F.layer_norm(y, y.shape[-1:], eps=setting.epsilon).flatten(1, 2)  # (B,K,C)
        unit = _rounded(unit, setting)
        logits = _rounded(query, setting) @ unit.transpose(1, 2)  # (B,H,K)
        return _rounded(torch.softmax(logits.to(sums), -1), setting) @ unit


def gradients(
    setting: Setting, inputs: LayerTensors, gradient: Tensor, needed: frozenset[str]
) -> LayerTensors:
    """Return the gradients of the inputs, which can be differentiated again where autograd is on.

    Args:
        gradient: of the mean, (B, H, C).
        needed: fields of the inputs whose gradients are needed.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: an input may have been made from another one, whose gradient is this function's share alone.
        given = {
            name: tensor.view_as(tensor) if name in needed else tensor
            for part in inputs
            for name, tensor in part._asdict().items()
        }
        clips = ClipTensors(**{name: given[name] for name in ClipTensors._fields})
        shared = SharedTensors(**{name: given[name] for name in SharedTensors._fields})
        mean = attended(setting, LayerTensors(clips, shared))
        wanted = [name for name in given if name in needed]
        found = torch.autograd.grad(
            mean,
            [given[name] for name in wanted],
            gradient.to(mean.dtype),
            create_graph=again,
            allow_unused=True,
        )
    by_name = dict(zip(wanted, found, strict=True))
    return LayerTensors(
        ClipTensors(*(by_name.get(name) for name in ClipTensors._fields)),
        SharedTensors(*(by_name.get(name) for name in SharedTensors._fields)),
    )


def _rounded(values: Tensor, setting: Setting) -> Tensor:
    """Return values in the dtype of sums, rounded to that of products: their products are then those of the other paths."""
    return values.to(setting.products).to(setting.sums)


def _positioned(setting: Setting, inputs: LayerTensors) -> Tensor:
    """Return tokens with what the temporal modules add, (B, T, N, C) in the dtype of sums."""
    shared, maps = inputs.shared, inputs.clips.stored_maps()
    tokens = _tokens(inputs.clips.stored_tokens(), setting.sums)
    y = tokens
    if shared.taps is not None:
        before, here, after = shared.taps.unbind(0)
        y = y + tokens * here
        y = y + F.pad(tokens[:, :-1], (0, 0, 0, 0, 1, 0)) * before
        y = y + F.pad(tokens[:, 1:], (0, 0, 0, 0, 0, 1)) * after
    if shared.shift is not None:
        y = y + shared.shift[:, None]
    if maps is not None and shared.table_prev is not None and shared.table_next is not None:
        # The class token, and the frame that has no neighbour, get nothing.
        values = _rounded(_maps(maps, setting.sums), setting)
        prev = _moved(values[:, 0], _rounded(shared.table_prev, setting), setting.grid)
        following = _moved(values[:, 1], _rounded(shared.table_next, setting), setting.grid)
        y = y + F.pad(prev, (0, 0, 1, 0, 1, 0)) + F.pad(following, (0, 0, 1, 0, 0, 1))
    return y


def _moved(maps: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return every patch's motion, (B, T-1, P, C), from maps (B, T-1, P, P) and a flipped table (R, C)."""
    height, width = grid
    rows = table.view(2 * height - 1, 2 * width - 1, -1)
    by_query = _windows(_windows(rows, 1, width), 1, height)  # (Hp,Wp,Hp,Wp,C)
    return torch.einsum("btqk,qkc->btqc", maps, by_query.flatten(2, 3).flatten(0, 1))


def _windows(values: Tensor, axis: int, size: int) -> Tensor:
    """Return the `size` windows of an axis of 2 size - 1 values, the last one first, stacked along a new first axis."""
    # Slices, as not all transforms know `unfold`.
    return torch.stack([values.narrow(axis, start, size) for start in reversed(range(size))])


def _tokens(stored: StoredTokens, dtype: torch.dtype) -> Tensor:
    """Return one layer's tokens (B, T, N, C), decoded."""
    values = stored.tokens.to(dtype)
    if stored.affine is not None:
        affine = stored.affine.to(dtype)[:, None, None]  # (B,1,1,2,C)
        values = torch.addcmul(affine[..., 1, :], values, affine[..., 0, :])
    if stored.token_scale is not None:
        values = values * stored.token_scale.to(dtype)[..., None]
    return values


def _maps(stored: StoredMaps, dtype: torch.dtype) -> Tensor:
    """Return one layer's maps (B, 2, T-1, P, P), decoded."""
    values = stored.maps.to(dtype)
    if stored.row_max is None:
        return values
    root = stored.row_max.to(dtype).sqrt() / 255
    return (values * root[..., None]).square()
