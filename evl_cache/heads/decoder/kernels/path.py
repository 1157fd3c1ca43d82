"""The attention of one decoder layer by Triton kernels, forward and backward.

B clips, T frames, N = 1+P tokens of a frame, C channels, H heads, K = T N tokens of a clip. Of a layer's tokens one
tensor exists, those with position in the dtype of products; their gradient takes its place.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from evl_cache.heads.decoder.kernels.attention import Attended, attend
from evl_cache.heads.decoder.kernels.attention_gradients import attention_gradients
from evl_cache.heads.decoder.kernels.position_gradients import position_gradients
from evl_cache.heads.decoder.kernels.positioned import positioned
from evl_cache.heads.decoder.kernels.table_gradients import table_gradients
from evl_cache.heads.decoder.tensors import (
    ClipTensors,
    LayerTensors,
    Setting,
    SharedTensors,
    StoredMaps,
    StoredTokens,
)
from evl_cache.precision import tf32_is_on


def forward(setting: Setting, inputs: LayerTensors) -> tuple[Tensor, Sequence[Tensor]]:
    """See `paths.AttentionPath`."""
    assert inputs.clips.query is not None
    tokens, maps = _stored(inputs)
    tf32 = tf32_is_on()
    with _on(setting.device):
        y = positioned(tokens, maps, inputs.shared, setting.grid, setting.products, tf32=tf32)
        attended = attend(y, inputs.clips.query, setting.epsilon, tf32=tf32)
    return attended.mean, [y, *attended] if setting.keep else []


def backward(
    setting: Setting,
    inputs: LayerTensors,
    kept: Sequence[Tensor],
    gradient: Tensor,
    needed: frozenset[str],
    *,
    again: bool,
) -> LayerTensors:
    """See `paths.AttentionPath`. Stored tokens and maps get no gradient: `choice.suits` leaves such inputs to others."""
    with _on(setting.device):
        return _gradients(setting, inputs, kept, gradient, needed, write_over=not again)


def _gradients(
    setting: Setting,
    inputs: LayerTensors,
    kept: Sequence[Tensor],
    gradient: Tensor,
    needed: frozenset[str],
    *,
    write_over: bool,
) -> LayerTensors:
    assert inputs.clips.query is not None
    tokens, maps = _stored(inputs)
    y, attended = kept[0], Attended(*kept[1:])
    tf32 = tf32_is_on()
    query, dy = attention_gradients(
        y,
        inputs.clips.query,
        gradient.to(setting.sums).contiguous(),
        attended,
        write_over=write_over,
        wanted=bool(needed & set(SharedTensors._fields)),
        tf32=tf32,
    )
    clips = ClipTensors(query=query)
    if dy is None:
        return LayerTensors(clips, SharedTensors(None, None, None, None))
    of_position = position_gradients(dy, tokens, taps="taps" in needed, shift="shift" in needed)
    tables: tuple[Tensor | None, Tensor | None] = (None, None)
    if maps is not None and needed & {"table_prev", "table_next"}:
        tables = table_gradients(maps, dy, setting.grid, tf32=tf32)
    return LayerTensors(clips, SharedTensors(*of_position, *tables))


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one: Triton starts kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stored(inputs: LayerTensors) -> tuple[StoredTokens, StoredMaps | None]:
    """Return what is read, dense; maps only where there are tables to read by them."""
    clips = ClipTensors(*(None if t is None else t.contiguous() for t in inputs.clips))
    moves = inputs.shared.table_prev is not None
    return clips.stored_tokens(), clips.stored_maps() if moves else None
