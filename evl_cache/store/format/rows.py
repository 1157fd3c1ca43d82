"""Features as they are stored, and back; `row_making` makes them.

B samples of a batch, T frames, P patches, N = 1+P tokens, C channels, L layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from evl_cache.quantize import (
    QuantizedMaps,
    QuantizedTokens,
    dequantize_maps,
    dequantize_tokens,
)
from evl_cache.store.format.recomputed import RecomputedMaps

Row = Mapping[str, np.ndarray[Any, Any]]  # array name -> (L, *chunk)
StoredTokens = QuantizedTokens | torch.Tensor
StoredMaps = QuantizedMaps | torch.Tensor | RecomputedMaps


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """Features of several samples as they are stored, shallow to deep; dequantise where they are used.

    Attributes:
        tokens: L of QuantizedTokens with (B, T, N, C) codes, or float16 (B, T, N, C); none where only class tokens
            were read.
        maps: L of QuantizedMaps with (B, 2, T-1, P, P) codes, or float16, or to be made from tokens one layer
            below; None where there are none.
        class_tokens: L of float16 (B, T, 1, C); None where they were not read.
    """

    tokens: list[StoredTokens]
    maps: list[StoredMaps] | None
    class_tokens: list[torch.Tensor] | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "StoredBatch":
        """Return the batch on another device."""
        return self._mapped(lambda v: v.to(device, non_blocking=non_blocking))

    def part(self, start: int, stop: int) -> "StoredBatch":
        """Return samples start .. stop-1, which share memory with the batch."""
        return self._mapped(lambda v: v[start:stop])

    def repeated(self, count: int) -> "StoredBatch":
        """Return a batch of `count` samples, these again and again, in new memory."""
        return self._mapped(lambda v: v[torch.arange(count, device=v.device) % len(v)])

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor of the batch once, in a fixed order."""
        found: list[torch.Tensor] = []

        def noted(value: torch.Tensor) -> torch.Tensor:
            found.append(value)
            return value

        self._mapped(noted)
        return found

    def with_made_maps(self) -> "StoredBatch":
        """Return the batch as a head takes it: maps that are not stored are made, float32, on the features' device."""
        if self.maps is None:
            return self
        maps = [m.made() if isinstance(m, RecomputedMaps) else m for m in self.maps]
        return replace(self, maps=list(maps))

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "StoredBatch":
        """Apply `function` to every tensor, once: tokens of one layer may be the source of the next one's maps."""
        done: dict[int, Any] = {}

        def once(value: StoredTokens) -> Any:
            if id(value) not in done:
                done[id(value)] = _map(value, function)
            return done[id(value)]

        def mapped(maps: StoredMaps) -> StoredMaps:
            if isinstance(maps, RecomputedMaps):
                return RecomputedMaps(below=once(maps.below), projection=maps.projection)
            mapped_maps: StoredMaps = _map(maps, function)
            return mapped_maps

        return StoredBatch(
            tokens=[once(t) for t in self.tokens],
            maps=None if self.maps is None else [mapped(m) for m in self.maps],
            class_tokens=None if self.class_tokens is None else [function(t) for t in self.class_tokens],
        )

    def dequantized(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Return tokens and maps as tensors of `dtype`."""
        tokens = [
            t.to(dtype)
            if isinstance(t, torch.Tensor)
            else dequantize_tokens(t.codes, t.affine, t.scale, dtype)
            for t in self.tokens
        ]
        if self.maps is None:
            return tokens, None
        return tokens, [_dequantized_maps(m, dtype) for m in self.maps]


def _dequantized_maps(maps: StoredMaps, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(maps, QuantizedMaps):
        return dequantize_maps(maps.codes, maps.row_max, dtype)
    return (maps.made() if isinstance(maps, RecomputedMaps) else maps).to(dtype)


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `function` to every tensor of stored tokens or maps."""
    if isinstance(value, QuantizedTokens):
        scale = None if value.scale is None else function(value.scale)
        return QuantizedTokens(codes=function(value.codes), affine=function(value.affine), scale=scale)
    if isinstance(value, QuantizedMaps):
        return QuantizedMaps(codes=function(value.codes), row_max=function(value.row_max))
    return function(value)
