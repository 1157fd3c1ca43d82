"""The frozen image tower: unpooled tokens of several blocks and the maps made from their queries and keys.

B clips, T frames, P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from evl_cache.attention_maps import MapProjection, patch_maps
from evl_cache.errors import UsageError
from evl_cache.towers.families import adapter_of


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a backbone gives of a batch of clips, by block number (counted from 1).

    Attributes:
        tokens: block -> (B, T, 1+P, C): the class token (a tower without one: the mean of the patches), then patches.
        maps: block -> (B, 2, T-1, P, P); empty for a single frame, or where maps were not asked for.
    """

    tokens: dict[int, torch.Tensor]
    maps: dict[int, torch.Tensor]


class Backbone(nn.Module):
    """An image tower, frozen, in eval mode, cut after the last block needed.

    Args:
        visual: an open_clip VisionTransformer or TimmModel, or a VisionTransformer or Eva of timm.
        layers: blocks to keep, counted from 1.
        with_maps: also make the adjacent-frame maps of those blocks.

    Raises: UsageError for a tower that is no such transformer, or layers out of its range.
    """

    def __init__(self, visual: nn.Module, layers: Sequence[int], *, with_maps: bool = True) -> None:
        super().__init__()
        self._tower = adapter_of(visual)
        self.layers = check_layers(layers, self._tower.num_blocks)
        self.visual = visual.eval().requires_grad_(False)
        self.with_maps = with_maps

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: torch.Tensor) -> Features:
        """Tokens and maps of normalised frames.

        Args:
            frames: float (B, T, 3, S, S), normalised with the tower's mean and std, on its device.

        Raises: UsageError for another shape.
        """
        size = self._tower.image_size
        if frames.ndim != 5 or frames.shape[2] != 3 or tuple(frames.shape[-2:]) != size:
            raise UsageError(
                f"frames are {tuple(frames.shape)}; this tower expects (B, T, 3, {size[0]}, {size[1]})"
            )
        shape = frames.shape[:2]  # B, T
        maps: dict[int, torch.Tensor] = {}

        def make_maps(layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
            maps[layer] = patch_maps(q.view(*shape, *q.shape[1:]), k.view(*shape, *k.shape[1:]))

        tokens = self._tower.tokens(
            frames.flatten(0, 1).to(self._tower.dtype),
            self.layers,
            make_maps if self.with_maps and shape[1] > 1 else None,
        )
        return Features(
            tokens={layer: block.view(*shape, *block.shape[1:]) for layer, block in tokens.items()},
            maps=maps,
        )


def map_projections(
    visual: nn.Module, layers: Sequence[int], *, compute_dtype: torch.dtype
) -> dict[int, MapProjection]:
    """What makes the maps of some blocks from the tokens below them, on the CPU.

    The projection is rounded to `compute_dtype`, with which the tower ran, and then to float16, which costs
    less than int8 tokens do by far; the rest is float32. The same for a tower that was moved to
    `compute_dtype` before.

    Raises: UsageError for a tower that is no such transformer, layers out of its range, or queries and keys
        that more than a norm and a matrix make.
    """
    tower = adapter_of(visual)
    return {
        number: tower.projection(number, compute_dtype) for number in check_layers(layers, tower.num_blocks)
    }


def check_layers(layers: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Sorted, distinct block numbers. Raises: UsageError for none, or one outside 1 .. num_blocks."""
    out = tuple(sorted({int(layer) for layer in layers}))
    if not out or out[0] < 1 or out[-1] > num_blocks:
        raise UsageError(f"layers {list(layers)}; this tower has blocks 1 to {num_blocks}: choose among them")
    return out
