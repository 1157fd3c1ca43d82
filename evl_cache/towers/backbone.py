"""The frozen image tower: unpooled tokens of several layers, and the maps made from their queries and keys.

B clips, T frames, P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from evl_cache.attention_maps import MapProjection, patch_maps
from evl_cache.errors import UsageError
from evl_cache.notation import layer_set
from evl_cache.towers.families import adapter_of
from evl_cache.towers.frozen_twin import frozen_twin


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of a batch of clips, by layer, numbered from 1.

    Attributes:
        tokens: (B, T, 1+P, C) by layer: the class token (in a tower without one, the mean of the patches), then patches.
        maps: (B, 2, T-1, P, P) by layer; empty for a single frame, or where maps were not asked for.
    """

    tokens: dict[int, torch.Tensor]
    maps: dict[int, torch.Tensor]


class Backbone(nn.Module):
    """A frozen image tower in eval mode, which stops after the last layer needed.

    The tower that is given stays as it is, in its mode and with its gradients: the backbone computes with a twin of it,
    `visual`, whose weights lie in the same memory. To move it or to change its dtype, do so with the backbone; weights that
    are put in the place of others, as `load_state_dict(…, assign=True)` does, are not the twin's.

    Args:
        visual: an open_clip VisionTransformer or TimmModel, or a VisionTransformer or Eva of timm.
        layers: layers whose features are returned, numbered from 1.
        with_maps: whether to make the adjacent-frame maps of those layers too.

    Raises: UsageError for a tower that is no such transformer, or for layers that it does not have.
    """

    def __init__(self, visual: nn.Module, layers: Sequence[int], *, with_maps: bool = True) -> None:
        super().__init__()
        self.layers = check_layers(layers, adapter_of(visual).num_layers)
        self.visual = frozen_twin(visual)
        self._tower = adapter_of(self.visual)
        self.with_maps = with_maps

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode, as the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: torch.Tensor) -> Features:
        """Return tokens and maps of normalised frames.

        Args:
            frames: floating, (B, T, 3, S, S), normalised with the tower's mean and std, on its device.

        Raises: UsageError for another shape, and for frames of bytes.
        """
        size = self._tower.image_size
        _check_numbers(frames)
        if frames.ndim != 5 or frames.shape[2] != 3 or tuple(frames.shape[-2:]) != size:
            raise UsageError(
                f"frames are {tuple(frames.shape)}; this tower expects (B, T, 3, {size[0]}, {size[1]}): crop them to it"
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
            tokens={layer: values.view(*shape, *values.shape[1:]) for layer, values in tokens.items()},
            maps=maps,
        )


def _check_numbers(frames: object) -> None:
    """Check that frames are a floating tensor: bytes of pictures are not normalised. Raises: UsageError."""
    if not isinstance(frames, torch.Tensor) or not frames.is_floating_point():
        kind = str(getattr(frames, "dtype", type(frames).__name__)).removeprefix("torch.")
        raise UsageError(
            f"frames are {kind}; expected a floating tensor, normalised with the tower's mean and std: "
            "evl_cache.preprocess.spatial_crops makes one of decoded frames"
        )


def map_projections(
    visual: nn.Module, layers: Sequence[int], *, compute_dtype: torch.dtype
) -> dict[int, MapProjection]:
    """Return what computes the maps of some layers from the tokens below them, on the CPU.

    The matrix is rounded to `compute_dtype`, in which the tower ran, and then to float16, whose error is far below
    that of int8 tokens. The rest is rounded to `compute_dtype` and kept as float32. A tower that was moved to
    `compute_dtype` before gives the same.

    Args:
        visual: as `Backbone` takes it.
        layers: numbered from 1.
        compute_dtype: in which the tower ran.

    Raises: UsageError for a tower that is no such transformer, for layers that it does not have, or where more than a
        norm and a matrix makes queries and keys.
    """
    tower = adapter_of(visual)
    return {
        number: tower.projection(number, compute_dtype) for number in check_layers(layers, tower.num_layers)
    }


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return the distinct layers, ascending. Raises: UsageError for none, or for one outside 1 .. num_layers."""
    out = layer_set(layers)
    if not out or out[0] < 1 or out[-1] > num_layers:
        raise UsageError(f"layers {list(out)}; this tower has layers 1 to {num_layers}: choose among them")
    return out
