"""What a decoder layer's attention is computed from, and what it keeps: tensors as they are stored, by name.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, H heads, R rows of a motion table.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evl_cache.heads.decoder.workspace import Workspace
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.quantize import QuantizedMaps, QuantizedTokens


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """One layer's tokens of some clips, as they are stored.

    A value is (code * affine[:, 0] + affine[:, 1]) * token_scale.

    Attributes:
        tokens: (B, T, N, C), floating or int8 codes.
        affine: scale and offset of each channel, (B, 2, C); None where tokens are floating.
        token_scale: (B, T, N), or None.
    """

    tokens: Tensor
    affine: Tensor | None
    token_scale: Tensor | None

    def load(self, places: slice, out: Tensor) -> Tensor:
        """Write some of the N tokens, decoded, into `out` (Q, T, B, C), frames before clips, and return it."""
        out.copy_(self.tokens[:, :, places].permute(2, 1, 0, 3))
        if self.affine is not None:
            affine = self.affine.to(out.dtype)
            torch.addcmul(affine[:, 1], out, affine[:, 0], out=out)
        if self.token_scale is not None:
            out.mul_(self.token_scale[:, :, places].permute(2, 1, 0).to(out.dtype)[..., None])
        return out


def stored_tokens(tokens: Tensor | QuantizedTokens | LayerTokens) -> StoredTokens:
    """Return one layer's tokens as `StoredTokens`; those that heads share are decoded once for all."""
    if isinstance(tokens, LayerTokens):
        tokens = tokens.values
    if isinstance(tokens, QuantizedTokens):
        return StoredTokens(tokens=tokens.codes, affine=tokens.affine, token_scale=tokens.scale)
    return StoredTokens(tokens=tokens, affine=None, token_scale=None)


@dataclass(frozen=True, kw_only=True)
class StoredMaps:
    """One layer's maps of some clips, as they are stored.

    Attributes:
        maps: (B, 2, T-1, P, P), floating or uint8 codes.
        row_max: a row's largest value, (B, 2, T-1, P); None where maps are floating.
    """

    maps: Tensor
    row_max: Tensor | None

    def load(self, direction: int, patches: slice, out: Tensor) -> Tensor:
        """Write rows of some query patches into `out` (Q, T-1, B, P), frames before clips, and return it.

        `direction` is 0 for prev, 1 for next.
        """
        maps = self.maps[:, direction, :, patches].permute(2, 1, 0, 3)
        if self.row_max is None:
            return out.copy_(maps)
        sums = torch.promote_types(out.dtype, torch.float32)
        top = self.row_max[:, direction, :, patches].permute(2, 1, 0)
        root = top.to(sums).sqrt() / 255
        # In float32, and rounded once: a root and a product rounded to bfloat16 would err three times as much. Codes are
        # widened first: a processor multiplies them with float32 an eighth slower than it does both.
        values = out if out.dtype == sums else torch.empty_like(out, dtype=sums)
        values.copy_(maps).mul_(root[..., None])
        return torch.mul(values, values, out=out)


def stored_maps(maps: Tensor | QuantizedMaps) -> StoredMaps:
    """Return one layer's maps as `StoredMaps`."""
    if isinstance(maps, QuantizedMaps):
        return StoredMaps(maps=maps.codes, row_max=maps.row_max)
    return StoredMaps(maps=maps, row_max=None)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a pass is computed.

    Attributes:
        grid: patches (Hp, Wp).
        epsilon: of the norm.
        device: of all tensors.
        sums: dtype of everything that is added up.
        products: dtype of large matrix products.
        keep: whether there will be a backward pass.
        workspace: where large memory comes from.
    """

    grid: tuple[int, int]
    epsilon: float
    device: torch.device
    sums: torch.dtype
    products: torch.dtype
    keep: bool
    workspace: Workspace


class ClipTensors(NamedTuple):
    """The tensors of a pass that have a row for each clip, or their gradients.

    Attributes:
        query: (B, H, C).
        tokens: see `StoredTokens`, as are `affine` and `token_scale`.
        maps: see `StoredMaps`, as is `row_max`; None adds no motion.
    """

    query: Tensor | None = None
    tokens: Tensor | None = None
    affine: Tensor | None = None
    token_scale: Tensor | None = None
    maps: Tensor | None = None
    row_max: Tensor | None = None

    def stored_tokens(self) -> StoredTokens:
        """Return the tokens as they are stored; there are some."""
        assert self.tokens is not None
        return StoredTokens(tokens=self.tokens, affine=self.affine, token_scale=self.token_scale)

    def stored_maps(self) -> StoredMaps | None:
        """Return the maps as they are stored, or None."""
        return None if self.maps is None else StoredMaps(maps=self.maps, row_max=self.row_max)


class SharedTensors(NamedTuple):
    """The tensors of a pass that all clips share, or their gradients; None for a temporal module that is off.

    Attributes:
        taps: see `TemporalShift`, as is `shift`.
        table_prev: motion table of the frame before, flipped, (R, C).
        table_next: motion table of the frame after, likewise.
    """

    taps: Tensor | None
    shift: Tensor | None
    table_prev: Tensor | None
    table_next: Tensor | None


class LayerTensors(NamedTuple):
    """All tensors that a pass reads, or their gradients."""

    clips: ClipTensors
    shared: SharedTensors


def slices_of(inputs: LayerTensors, sizes: Sequence[int]) -> list[LayerTensors]:
    """Return the inputs of each slice of so many clips; what clips share is in every one."""
    return [
        LayerTensors(
            ClipTensors(*(t if t is None else t[stop - size : stop] for t in inputs.clips)), inputs.shared
        )
        for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]


def joined(parts: Sequence[LayerTensors]) -> LayerTensors:
    """Return the gradients of all clips from those of their slices: put one after another, or added up if shared."""
    clips = (_joined(torch.cat, found) for found in zip(*(part.clips for part in parts), strict=True))
    shared = (_joined(sum, found) for found in zip(*(part.shared for part in parts), strict=True))
    return LayerTensors(ClipTensors(*clips), SharedTensors(*shared))


def _joined(join: Callable[[list[Tensor]], Any], gradients: Sequence[Tensor | None]) -> Tensor | None:
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) < 2:
        return found[0] if found else None
    whole: Tensor = join(found)
    return whole
