"""Maps that no cache stores: made on the device that uses them, from the tokens one layer below.

B samples, T frames, P patches, N = 1+P tokens, C channels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from evl_cache.attention_maps import MapProjection, maps_from_tokens, parts_of, projection_nbytes
from evl_cache.errors import CacheDamaged
from evl_cache.quantize import QuantizedTokens, dequantize_tokens
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.publish import write_atomic
from evl_cache.store.format.layout import PROJECTIONS_NAME
from evl_cache.store.format.limits import projections_limit
from evl_cache.store.objects.objects import Objects, objects_of

_TENSORS = ("norm_weight", "norm_bias", "weight", "bias")


class ProjectionOnDevices:
    """The projection of a layer, copied once to each device that uses it."""

    def __init__(self, projection: MapProjection) -> None:
        self._copies = {torch.device("cpu"): projection}

    def on(self, device: torch.device) -> MapProjection:
        """Return the projection on a device."""
        if device not in self._copies:
            self._copies[device] = self._copies[torch.device("cpu")].to(device)
        return self._copies[device]


@dataclass(frozen=True, kw_only=True)
class RecomputedMaps:
    """The maps of a layer for B samples, not made yet.

    Attributes:
        below: tokens (B, T, N, C) one layer below.
        projection: makes maps of them.
    """

    below: QuantizedTokens | torch.Tensor
    projection: ProjectionOnDevices

    def made(self) -> torch.Tensor:
        """Return the maps, float32 (B, 2, T-1, P, P), on the device of the tokens."""
        below = self.below
        values = below if isinstance(below, torch.Tensor) else below.codes
        projection = self.projection.on(values.device)
        clip_nbytes = projection_nbytes(values.shape, projection.num_heads)
        made = [
            maps_from_tokens(_dequantized(below, some), projection)
            for some in parts_of(len(values), device=values.device, clip_nbytes=clip_nbytes)
        ]
        return made[0] if len(made) == 1 else torch.cat(made)


def _dequantized(tokens: QuantizedTokens | torch.Tensor, some: slice) -> torch.Tensor:
    if isinstance(tokens, torch.Tensor):
        return tokens[some]
    scale = None if tokens.scale is None else tokens.scale[some]
    return dequantize_tokens(tokens.codes[some], tokens.affine[some], scale)


def projections_content(projections: Mapping[int, MapProjection]) -> bytes:
    """Return the bytes of `recompute.safetensors`: tensors named `<layer>.<field>`; the same for the same tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, projection in projections.items():
        tensors |= {f"{layer}.{name}": getattr(projection, name) for name in _TENSORS}
        tensors[f"{layer}.norm_eps"] = torch.tensor(projection.norm_eps, dtype=torch.float64)
    return bytes(save(tensors))


def write_projections(cache_path: Path, content: bytes) -> None:
    """Write `recompute.safetensors`, whole or not at all."""
    write_atomic(cache_path / PROJECTIONS_NAME, content)


def read_projections(place: Path | Objects, spec: CacheSpec, sha256: str | None) -> dict[int, MapProjection]:
    """Return the projections of a cache by layer.

    Raises: CacheDamaged where the file is not the one that was laid down.
    """
    objects = objects_of(place)
    where = f"{objects.url}/{PROJECTIONS_NAME}"
    try:
        content = objects.get(PROJECTIONS_NAME, most_nbytes=projections_limit(spec))
    except OSError as error:
        raise CacheDamaged(f"{where}: cannot be read ({error}); repair the cache") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CacheDamaged(f"{where}: does not match the cache's description; repair the cache")
    try:
        tensors = load(content)
        return {
            layer: MapProjection(
                norm_eps=float(tensors[f"{layer}.norm_eps"]),
                num_heads=spec.tower.heads,
                **{name: tensors[f"{layer}.{name}"] for name in _TENSORS},
            )
            for layer in spec.layers
        }
    except Exception as error:  # safetensors' own error class is not part of its public interface
        raise CacheDamaged(f"{where}: holds no projections ({error!r}); repair the cache") from error
