"""One layer's tokens as heads take them: decoded once, however many heads read them.

B clips, T frames, N = 1+P tokens of a frame, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evl_cache.heads.tracing import is_followed, is_watched
from evl_cache.quantize import QuantizedMaps, QuantizedTokens

NORM_EPSILON = 1e-5  # of torch's LayerNorm


class LayerTokens:
    """The tokens of one layer of the tower, and what can be computed from them without parameters.

    Each result is computed when it is first asked for and then kept: heads of a sweep that read the same layer share it.
    What a tracer or a transform makes in its place is not kept, nor what inference mode made used by autograd.

    Args:
        stored: (B, T, N, C) floating, or 8-bit codes. It must not be overwritten while this is in use.
    """

    def __init__(self, stored: Tensor | QuantizedTokens) -> None:
        self.stored = stored
        self._kept: dict[str, Tensor] = {}

    @property
    def values(self) -> Tensor:
        """The tokens (B, T, N, C), float32 or wider."""
        return self._once("values", lambda: _decoded(self.stored))

    @property
    def class_tokens(self) -> Tensor:
        """The frames' class tokens (B, T, C), float32 or wider; patch tokens are not decoded for them."""
        return self._once("class_tokens", self._class_tokens)

    @property
    def mean(self) -> Tensor:
        """The mean over all tokens of all frames, (B, C)."""
        return self._once("mean", lambda: self.values.mean((1, 2)))

    @property
    def unit(self) -> Tensor:
        """The layer norm of the tokens without gain and bias, (B, T, N, C)."""
        return self._once("unit", self._unit)

    @property
    def has_values(self) -> bool:
        """Whether all tokens were decoded."""
        return "values" in self._kept

    def _class_tokens(self) -> Tensor:
        if self.has_values:
            return self.values[:, :, 0]
        if isinstance(self.stored, Tensor):
            return _decoded(self.stored[:, :, 0])
        codes, scale = self.stored.codes[:, :, :1], self.stored.scale
        scale = None if scale is None else scale[:, :, :1]
        return _decoded(QuantizedTokens(codes=codes, affine=self.stored.affine, scale=scale))[:, :, 0]

    def _unit(self) -> Tensor:
        values = self.values
        return torch.nn.functional.layer_norm(values, values.shape[-1:], eps=NORM_EPSILON)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if is_followed() or is_watched():
            return make()
        kept = self._kept.get(name)
        if kept is None or (kept.is_inference() and not torch.is_inference_mode_enabled()):
            kept = self._kept[name] = make()
        return kept


def layer_tokens(tokens: Tensor | QuantizedTokens | LayerTokens) -> LayerTokens:
    """Return one layer's tokens as `LayerTokens`, whatever they are stored as."""
    return tokens if isinstance(tokens, LayerTokens) else LayerTokens(tokens)


def decoded_maps(maps: Tensor | QuantizedMaps, dtype: torch.dtype) -> Tensor:
    """Return maps (B, 2, T-1, P, P): floating ones as they are, codes as values of `dtype`.

    The values are bit for bit those that a head decodes from the codes.
    """
    if isinstance(maps, Tensor):
        return maps
    root = maps.row_max.to(torch.promote_types(dtype, torch.float32)).sqrt() / 255
    return (maps.codes * root[..., None]).square_().to(dtype)


def _decoded(stored: Tensor | QuantizedTokens) -> Tensor:
    """Return tokens as float32 or wider, by the same operations as `StoredTokens.load`, so with the same bits."""
    if isinstance(stored, Tensor):
        return stored.to(torch.promote_types(stored.dtype, torch.float32))
    scale, offset = stored.affine[:, None, None].unbind(-2)  # (B,1,1,C) each
    values = torch.addcmul(offset, stored.codes.float(), scale)
    return values if stored.scale is None else values.mul_(stored.scale.float()[..., None])
