"""Image towers with random weights, of open_clip, or of timm where that is not there."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.support.device_place import Place
from benchmarks.support.device_runner import is_there
from evl_cache.towers import Backbone, Tower, adapter_of, build_tower

_TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class MeasuredTower:
    """A tower on the device.

    Attributes:
        name: of the model, or of the one in its place.
        tower: module and spec.
        backbone: of its last layers, with maps.
        width: channels.
    """

    name: str
    tower: Tower
    backbone: Backbone
    width: int

    @property
    def visual(self) -> nn.Module:
        """The module."""
        return self.tower.visual

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are kept."""
        return self.backbone.layers

    def class_tokens(self, frames: Tensor) -> Tensor:
        """Return the last layer's class tokens (S, C) of frames (S, 3, H, W), with gradients where they are on."""
        adapter = adapter_of(self.visual)
        last = adapter.num_layers
        return adapter.tokens(frames.to(adapter.dtype), (last,), None)[last][:, 0]


def model_of(place: Place, names: tuple[str, str]) -> str:
    """The name of a model as `--model` takes it: the first one, or the second where open_clip is not there."""
    wanted, other = names
    if not is_there("open_clip"):
        return other
    if wanted != "tiny":
        return wanted
    path = place.scratch / "tiny.json"
    path.write_text(json.dumps(_TINY))
    return str(path)


def image_tower(place: Place, names: tuple[str, str], *, dtype: torch.dtype) -> MeasuredTower:
    """A tower on the device, in a dtype."""
    tower = build_tower(model_of(place, names), "none")
    depth = tower.spec.blocks
    layers = range(depth - place.sizes.tower_layers + 1, depth + 1)
    visual = tower.visual.to(place.device, dtype)
    return MeasuredTower(
        name=tower.spec.model, tower=tower, backbone=Backbone(visual, tuple(layers)), width=tower.spec.width
    )


def random_frames(place: Place, tower: MeasuredTower, batch: int, dtype: torch.dtype) -> Tensor:
    """Frames (B, T, 3, S, S) on the device."""
    side = tower.tower.spec.image_size
    return torch.randn(batch, place.sizes.frames, 3, side, side, device=place.device, dtype=dtype)
