"""One query's attention over all tokens of a clip, positions included, in one pass over them as they lie.

B clips, T frames, C channels, H heads, R rows of a motion table.
Source: sections 3.2 and 3.3 of arXiv 2208.03550; why it is the same function: docs/architecture.md.

With one query, keys and values need not exist. A logit is `(W n + b) . q`, so the query can be carried to the
tokens instead: `n . (W^T q)` plus a constant that the softmax drops; and the mean of values is the value
projection of the mean token. The same holds for the gain and shift of the norm before them. So one large
thing is left, the tokens `norm(tokens + conv + position + motion)`: made chunk by chunk in a processor's
cache, used there, and kept for the backward pass, where no gradient of their size ever exists.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evl_cache.heads.decoder.chunks import TokenBlock, block_sizes
from evl_cache.heads.decoder.layer_gradients import layer_gradients
from evl_cache.heads.decoder.layer_pass import Kept, LayerPass, Setting
from evl_cache.heads.decoder.motion import MapBlock
from evl_cache.heads.decoder.threads import map_in_threads
from evl_cache.heads.decoder.workspace import Workspace

NUM_OF_CLIPS = 6  # of a LayerPass's tensors, those that have one row a clip
NUM_TENSORS = 10
Block = Sequence[Tensor | None]  # the tensors of a LayerPass


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
    return Setting(
        grid=grid,
        epsilon=epsilon,
        device=parameter.device,
        sums=sums,
        products=dtype,
        keep=keep,
        workspace=workspace,
    )


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
    stored = (None, None) if maps is None else (maps.maps, maps.row_max)
    inputs = (query, tokens.tokens, tokens.affine, tokens.token_scale, *stored)
    attended: Tensor = _Attend.apply(setting, *inputs, position.taps, position.shift, *tables)
    return attended


class _Attend(torch.autograd.Function):
    """Inputs: the setting, then the tensors of `LayerPass` in its order, of all clips."""

    @staticmethod
    def forward(ctx: Any, setting: Setting, *tensors: Tensor | None) -> Tensor:
        def run(block: Block) -> Kept:
            return LayerPass(setting, block).forward()

        tokens = tensors[1]
        assert tokens is not None
        sizes = block_sizes(tokens.shape, setting.device)
        kept = map_in_threads(run, _blocks(tensors, sizes), setting.device)
        ctx.setting = setting
        ctx.save_for_backward(*tensors, *(tensor for block in kept for tensor in block))
        return torch.cat([block.mean for block in kept])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        setting, saved, needed = ctx.setting, ctx.saved_tensors, ctx.needs_input_grad[1:]
        starts = range(NUM_TENSORS, len(saved), len(Kept._fields))
        kept = [Kept(*saved[start : start + len(Kept._fields)]) for start in starts]
        sizes = [len(block.mean) for block in kept]

        def run(block: tuple[Block, Kept, Tensor]) -> tuple[Tensor | None, ...]:
            tensors, kept_of_block, gradient_of_block = block
            return layer_gradients(LayerPass(setting, tensors), kept_of_block, gradient_of_block, needed)

        blocks = _blocks(saved[:NUM_TENSORS], sizes)
        work = list(zip(blocks, kept, torch.split(gradient, sizes), strict=True))
        joined = _joined(map_in_threads(run, work, setting.device))
        if not _graph_is_kept():
            setting.workspace.give_back(*(block.normed for block in kept))
        return None, *joined


def _blocks(tensors: Block, sizes: Sequence[int]) -> list[Block]:
    """The tensors of each block of clips: those of clips, which come first, cut, the shared ones as they are."""
    stops = list(itertools.accumulate(sizes))
    return [
        [t if t is None or i >= NUM_OF_CLIPS else t[stop - size : stop] for i, t in enumerate(tensors)]
        for size, stop in zip(sizes, stops, strict=True)
    ]


def _joined(blocks: Sequence[Block]) -> Block:
    """Gradients of all clips from those of the blocks: put together for clips' tensors, added for others."""
    joined: list[Tensor | None] = []
    for i, parts in enumerate(zip(*blocks, strict=True)):
        found = [part for part in parts if part is not None]
        whole = torch.cat if i < NUM_OF_CLIPS else sum
        joined.append(whole(found) if found else None)
    return joined


def _graph_is_kept() -> bool:
    """Whether the backward pass now running was asked to retain the graph; True where torch does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
