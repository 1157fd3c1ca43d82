"""The attention of one decoder layer on a processor: slices of clips in threads, each in chunks.

B clips, H heads, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evl_cache.heads.decoder.chunked.chunks import slice_sizes
from evl_cache.heads.decoder.chunked.layer_gradients import layer_gradients
from evl_cache.heads.decoder.chunked.layer_pass import Kept, LayerPass
from evl_cache.heads.decoder.chunked.threads import map_in_threads
from evl_cache.heads.decoder.tensors import LayerTensors, Setting, joined, slices_of


def forward(setting: Setting, inputs: LayerTensors) -> tuple[Tensor, Sequence[Tensor]]:
    """See `paths.AttentionPath`."""

    def run(part: LayerTensors) -> Kept:
        return LayerPass(setting, part).forward()

    assert inputs.clips.tokens is not None
    sizes = slice_sizes(inputs.clips.tokens.shape)
    kept = map_in_threads(run, slices_of(inputs, sizes), setting.device)
    return torch.cat([part.mean for part in kept]), [tensor for part in kept for tensor in part]


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
    each = len(Kept._fields)
    parts = [Kept(*kept[start : start + each]) for start in range(0, len(kept), each)]
    sizes = [len(part.mean) for part in parts]

    def run(part: tuple[LayerTensors, Kept, Tensor]) -> LayerTensors:
        tensors, kept_of_part, gradient_of_part = part
        return layer_gradients(LayerPass(setting, tensors), kept_of_part, gradient_of_part, needed)

    work = list(zip(slices_of(inputs, sizes), parts, torch.split(gradient, sizes), strict=True))
    found = map_in_threads(run, work, setting.device)
    if not again:
        setting.workspace.give_back(*(part.normed for part in parts))
    return joined(found)
