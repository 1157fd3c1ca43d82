"""Preallocated arrays that batches of samples are read into, again and again.

B slots, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from evl_cache.quantize import QuantizedMaps, QuantizedTokens
from evl_cache.store.format.layout import ArrayLayout
from evl_cache.store.format.recomputed import ProjectionOnDevices, RecomputedMaps
from evl_cache.store.format.rows import StoredBatch, StoredMaps, StoredTokens

TOKEN_ARRAYS = ("tokens", "token_affine", "token_scale")
MAP_ARRAYS = ("maps", "map_scale")
_HUGE_PAGE_NBYTES = 2 << 20
CLASS_ARRAYS = ("class_tokens",)
_CPU = torch.device("cpu")
TokensRead = Literal["all", "class", "both"]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What is read of each sample.

    Attributes:
        layers: of the tower, shallow to deep.
        with_maps: their maps too, where the cache has some.
        tokens: all of a frame, its class token alone (without maps), or `both`: all, and class tokens in float16.
    """

    layers: tuple[int, ...]
    with_maps: bool = True
    tokens: TokensRead = "all"

    def __post_init__(self) -> None:
        assert self.tokens != "class" or not self.with_maps, "maps come with all tokens"


@dataclass(frozen=True, kw_only=True)
class ProjectedMaps:
    """The tokens that give the maps of each layer, where maps are not stored.

    Attributes:
        wanted: layers whose features are asked for.
        held: those and the ones below, shallow to deep.
        projections: how each wanted layer's maps are made.
    """

    wanted: tuple[int, ...]
    held: tuple[int, ...]
    projections: Mapping[int, ProjectionOnDevices]

    def applied(self, held: StoredBatch) -> StoredBatch:
        """Return tokens of the wanted layers, and their maps, to be made, from tokens of the held ones."""
        tokens = dict(zip(self.held, held.tokens, strict=True))
        class_tokens = None
        if held.class_tokens is not None:
            by_layer = dict(zip(self.held, held.class_tokens, strict=True))
            class_tokens = [by_layer[layer] for layer in self.wanted]
        return StoredBatch(
            class_tokens=class_tokens,
            tokens=[tokens[layer] for layer in self.wanted],
            maps=[
                RecomputedMaps(below=tokens[layer - 1], projection=self.projections[layer])
                for layer in self.wanted
            ],
        )


class BatchBuffers:
    """One array of B slots for each stored array and layer.

    Args:
        layouts: the stored arrays to hold.
        num_layers: L.
        slots: B.
        pin_memory: page-locked, so that copies to a GPU overlap its work.
        projected: how maps are made from the tokens, where they are not stored; its `held` layers are the L.
        device: where they lie.

    Attributes:
        whole: a tensor (L, B, *chunk) by name.
        tensors: its L tensors by name.
        arrays: L numpy arrays (B, *chunk) by name, which share memory with `tensors`; none on a GPU.
        stacked: an array (L, B, *chunk) by name, in the same memory; none on a GPU.
    """

    def __init__(
        self,
        layouts: Sequence[ArrayLayout],
        *,
        num_layers: int,
        slots: int,
        pin_memory: bool = False,
        projected: ProjectedMaps | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.slots, self.projected = slots, projected
        # One piece a stored array: a sample's layers are then filled by one strided copy.
        self.whole: Mapping[str, torch.Tensor] = {
            layout.name: _memory((num_layers, slots, *layout.chunk_shape), layout.dtype, pin_memory, device)
            for layout in layouts
        }
        self.tensors: Mapping[str, list[torch.Tensor]] = {name: list(t) for name, t in self.whole.items()}
        on_host = device.type == "cpu"
        self.stacked: Mapping[str, np.ndarray[Any, Any]] = {
            name: t.numpy() for name, t in self.whole.items() if on_host
        }
        self.arrays: Mapping[str, list[np.ndarray[Any, Any]]] = {
            name: list(array) for name, array in self.stacked.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.nbytes for t in self.whole.values())

    def holds_the_same(self, other: "BatchBuffers") -> bool:
        """Whether slots are as another's: the same arrays, and maps that are made in the same way."""
        mine, theirs = (
            {name: (t.dtype, len(t), t.shape[2:]) for name, t in side.whole.items()} for side in (self, other)
        )
        if self.projected is None or other.projected is None:
            return mine == theirs and self.projected is other.projected
        ours, others = self.projected, other.projected
        return (
            mine == theirs
            and (ours.wanted, ours.held) == (others.wanted, others.held)
            and ours.projections is others.projections
        )

    def batch(self, count: int) -> StoredBatch:
        """Return the first `count` slots as features; they share the buffers' memory."""
        held = stored_batch({name: [t[:count] for t in tensors] for name, tensors in self.tensors.items()})
        return held if self.projected is None else self.projected.applied(held)


def _memory(shape: tuple[int, ...], dtype: str, pin_memory: bool, device: torch.device) -> torch.Tensor:
    if pin_memory or device.type != "cpu":
        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=pin_memory, device=device)
    # On the boundary of a huge page: numpy asks for these, and copies between even addresses are faster.
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    whole = np.empty(nbytes + _HUGE_PAGE_NBYTES, np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE_NBYTES
    return torch.from_numpy(whole[start : start + nbytes].view(dtype).reshape(shape))


def stored_batch(tensors: Mapping[str, Sequence[torch.Tensor]]) -> StoredBatch:
    """Return features made of L tensors (B, *chunk) of each stored array."""
    tokens: list[StoredTokens] = list(tensors.get("tokens", []))
    if "token_affine" in tensors:
        parts = zip(*(tensors[name] for name in TOKEN_ARRAYS), strict=True)
        tokens = [QuantizedTokens(codes=codes, affine=affine, scale=scale) for codes, affine, scale in parts]
    maps: list[StoredMaps] | None = list(tensors["maps"]) if "maps" in tensors else None
    if "map_scale" in tensors:
        pairs = zip(*(tensors[name] for name in MAP_ARRAYS), strict=True)
        maps = [QuantizedMaps(codes=codes, row_max=row_max) for codes, row_max in pairs]
    class_tokens = [t[:, :, None] for t in tensors["class_tokens"]] if "class_tokens" in tensors else None
    return StoredBatch(tokens=tokens, maps=maps, class_tokens=class_tokens)
