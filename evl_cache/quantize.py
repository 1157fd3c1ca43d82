"""Quantise tokens and attention maps to 8-bit codes, and decode them.

T frames, P patches, N = 1+P tokens of a frame (class token first), C channels, I items, K = T N. An item is one sample
and layer; every item, a leading index of `tokens`, is quantised alone.

Tokens: A few channels of CLIP are 20 to 100 times as large as the rest, so each channel has its own scale and offset. A
few tokens (registers) are ten times as large as the rest in every channel, and would make the step of all others coarse.
So each token has a scale too: exactly 1 for an ordinary token, its size over the median size for an outlier.
`value = (code * scale + offset) * token_scale`. Ranges are minimum to maximum, so nothing is clipped.

Maps: Rows of a softmax are peaked or flat. The square root gives small values more codes than a linear scale does, and
the row's maximum fits the range to the row. `value = (code / 255)**2 * row_max`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evl_cache.cpu_codes import (
    INT8_MIN,
    SMALLEST_TYPICAL_SHARE,
    STEPS,
    TINY,
    MapRows,
    TokenItem,
    encode,
    float16_at_least,
    inverse_or_zero,
    is_compiled,
    outlier_scale,
)
from evl_cache.errors import ClipError, UsageError

CodesT = TypeVar("CodesT", Tensor, npt.NDArray[Any])

# Values of one pass of torch. On a CPU small items share one, as a call costs as much as they; larger ones have compiled loops.
CPU_PASS_VALUES = 2**21
DEVICE_PASS_VALUES = 2**26
SMALL_ITEM_VALUES = 2**15
CPU_ROWS_VALUES = 2**20  # of attention maps, for a thread at once

TOKENS_EXPECTED = "finite values that int8 codes can span"
MAPS_EXPECTED = "finite values of at least 0 and at most 65504"
HALVES_EXPECTED = "finite values of at most 65504, the largest float16"


@dataclass(frozen=True, kw_only=True)
class QuantizedTokens:
    """Tokens as codes.

    Attributes:
        codes: int8 (..., T, N, C).
        affine: scale and offset of each channel, float32 (..., 2, C).
        scale: of each token, 1 for an ordinary one, float16 (..., T, N); None where it was switched off.
    """

    codes: Tensor
    affine: Tensor
    scale: Tensor | None

    def __post_init__(self) -> None:
        lead, channels = self.codes.shape[:-3], self.codes.shape[-1]
        assert self.codes.dtype == torch.int8 and self.affine.dtype == torch.float32
        assert self.affine.shape == (*lead, 2, channels), f"affine is {tuple(self.affine.shape)}"
        assert self.scale is None or self.scale.shape == self.codes.shape[:-1]


@dataclass(frozen=True, kw_only=True)
class QuantizedMaps:
    """Attention maps as codes.

    Attributes:
        codes: uint8 (..., P).
        row_max: a row's largest value, float16 (...).
    """

    codes: Tensor
    row_max: Tensor

    def __post_init__(self) -> None:
        assert self.codes.dtype == torch.uint8 and self.row_max.dtype == torch.float16
        assert self.row_max.shape == self.codes.shape[:-1]


def quantize_tokens(tokens: Tensor, *, token_scale: bool = True) -> QuantizedTokens:
    """Quantise tokens to int8, every leading index alone.

    On a CPU an item's codes are the same, bit for bit, in every batch.

    Args:
        tokens: floating, (..., T, N, C).
        token_scale: whether each token has a scale.

    Raises: ClipError naming the leading index of an item that is not finite or spans more than codes can hold;
        UsageError for a wrong shape or dtype.
    """
    if tokens.ndim < 3 or not tokens.is_floating_point() or 0 in tokens.shape[-3:]:
        raise UsageError(
            f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; quantize_tokens needs floating-point "
            "tokens of shape (..., frames, tokens, channels), none of them empty: pass a backbone's tokens"
        )
    *lead, frames, per_frame, channels = tokens.shape
    items = tokens.detach().reshape(-1, frames * per_frame, channels)  # (I, T*N, C)
    codes = torch.empty(items.shape, dtype=torch.int8, device=tokens.device)
    affine = torch.empty((len(items), 2, channels), dtype=torch.float32, device=tokens.device)
    scale = torch.ones(items.shape[:2], dtype=torch.float16, device=tokens.device)
    encode_tokens(items, codes, affine, scale if token_scale else None)
    finite = affine.isfinite().flatten(1).all(1) & scale.isfinite().all(1)
    _raise_for_first(~finite.reshape(lead), "tokens", TOKENS_EXPECTED)
    return QuantizedTokens(
        codes=codes.reshape(tokens.shape),
        affine=affine.reshape(*lead, 2, channels),
        scale=scale.reshape(*lead, frames, per_frame) if token_scale else None,
    )


def dequantize_tokens(
    codes: Tensor, affine: Tensor, scale: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return tokens (..., T, N, C), computed in float32 on the device of `codes`. No argument is changed.

    Args:
        codes: int8 (..., T, N, C).
        affine: scale and offset of each channel, (..., 2, C).
        scale: of each token, (..., T, N), or None.
        out_dtype: of the result.
    """
    channel_scale, channel_offset = affine.float()[..., None, None, :, :].unbind(-2)  # (..., 1, 1, C) each
    values = codes.to(torch.float32, copy=True).mul_(channel_scale).add_(channel_offset)
    if scale is not None:
        values.mul_(scale.float().unsqueeze(-1))
    return values.to(out_dtype)


def quantize_maps(maps: Tensor) -> QuantizedMaps:
    """Quantise attention maps (..., P), floating and not negative, to uint8, every row of P alone.

    Raises: ClipError naming the index of the first row that is not finite, has a negative value, or a maximum beyond
        float16; UsageError for a wrong shape or dtype.
    """
    if maps.ndim < 1 or not maps.is_floating_point() or maps.shape[-1] == 0:
        raise UsageError(
            f"maps are {maps.dtype} of shape {tuple(maps.shape)}; quantize_maps needs floating-point maps of "
            "shape (..., patches): pass a backbone's attention maps"
        )
    rows = maps.detach().reshape(-1, maps.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=maps.device)
    row_max = torch.empty(len(rows), dtype=torch.float16, device=maps.device)
    encode_maps(rows, codes, row_max)
    row_max = row_max.reshape(maps.shape[:-1])
    _raise_for_first(~row_max.isfinite(), "attention maps", MAPS_EXPECTED)
    return QuantizedMaps(codes=codes.reshape(maps.shape), row_max=row_max)


def encode_tokens(items: Tensor, codes: Tensor, affine: Tensor, scale: Tensor | None) -> None:
    """Write the codes of items. Where an item cannot be stored, `affine` or `scale` is not finite.

    Args:
        items: floating, (I, K, C).
        codes: int8 (I, K, C).
        affine: float32 (I, 2, C).
        scale: float16 (I, K), or None for tokens without a scale.
    """
    if not items.numel():
        return
    size = items[0].numel()
    if items.device.type == "cpu" and size >= SMALL_ITEM_VALUES and is_compiled():
        scales = [None] * len(items) if scale is None else scale.unbind()
        encode(list(map(TokenItem, items.unbind(), codes.unbind(), affine.unbind(), scales)))
        return
    step = max(1, _pass_values(items.device) // size)  # items in a pass
    for start in range(0, len(items), step):
        part = slice(start, start + step)
        values = items[part].float()
        if scale is not None:
            scale[part] = _token_scale(values)
            # Divide by the rounded scale: it is the one that decoding multiplies by.
            values = values / scale[part].float().unsqueeze(-1)
        _encode_channels(values, codes[part], affine[part])


def encode_maps(rows: Tensor, codes: Tensor, row_max: Tensor) -> None:
    """Write the codes of rows of attention maps. Where a row cannot be stored, `row_max` is not finite.

    Args:
        rows: floating, (R, P).
        codes: uint8 (R, P).
        row_max: float16 (R,).
    """
    if rows.device.type == "cpu" and rows.numel() >= SMALL_ITEM_VALUES and is_compiled():
        step = max(1, CPU_ROWS_VALUES // rows.shape[1])
        encode(list(map(MapRows, *(torch.split(each, step) for each in (rows, codes, row_max)))))
        return
    step = max(1, _pass_values(rows.device) // rows.shape[1])  # rows in a pass
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = rows[part].float()
        largest = torch.where(values.amin(-1) >= 0, float16_at_least(values.amax(-1)), torch.nan)
        row_max[part] = largest
        top = largest.float()
        gain = torch.where(top > 0, STEPS / top.sqrt(), 0.0).unsqueeze(-1)
        # Adding a half and cutting rounds; row_max >= every value, so 255.5 is never passed.
        codes[part] = values.sqrt().mul_(gain).add_(0.5)


def _pass_values(device: torch.device) -> int:
    return CPU_PASS_VALUES if device.type == "cpu" else DEVICE_PASS_VALUES


def dequantize_maps(codes: Tensor, row_max: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return maps (..., P) of `out_dtype` from `codes`, uint8 (..., P), and `row_max`, float16 (...)."""
    roots = codes.float() / STEPS
    return (roots * roots * row_max.float().unsqueeze(-1)).to(out_dtype)


def to_float16(values: Tensor, *, what: str = "tokens") -> Tensor:
    """Return values as float16. Raises: ClipError naming `what` and the first index that float16 cannot hold."""
    halves = values.detach().to(torch.float16)
    # The float32 sum of finite float16 values is finite, so one cheap reduction is enough unless something is wrong.
    if not bool(halves.sum(dtype=torch.float32).isfinite()):
        _raise_for_first(~halves.isfinite(), what, HALVES_EXPECTED)
    return halves


def frame_difference(codes: CodesT, out: npt.NDArray[Any] | None = None) -> CodesT:
    """Return codes (..., T, A, B) as differences to the frame before, modulo 256; frame 0 stays as it is.

    Neighbouring frames are similar, so differences compress better. `frame_sum_` is the exact inverse.

    Args:
        codes: int8 tokens (..., T, N, C) or uint8 maps (..., T-1, P, P), as a numpy array or a tensor.
        out: array of numpy to write into and return; a new one by default.
    """
    _check_codes(codes)
    if out is not None:
        assert isinstance(codes, np.ndarray)
        out[..., :1, :, :] = codes[..., :1, :, :]
        np.subtract(codes[..., 1:, :, :], codes[..., :-1, :, :], out=out[..., 1:, :, :])
        return out
    result = _copy(codes)
    result[..., 1:, :, :] -= codes[..., :-1, :, :]
    return result


def frame_sum_(codes: npt.NDArray[Any]) -> None:
    """Replace differences in a numpy array (..., T, A, B) by their running sum over T, modulo 256."""
    _check_codes(codes)
    frames = codes.shape[-3]
    for frame in range(1, frames):
        np.add(codes[..., frame, :, :], codes[..., frame - 1, :, :], out=codes[..., frame, :, :])


def _token_scale(values: Tensor) -> Tensor:
    """Return the scale of each token, float16 (I, K), of values, float32 (I, K, C); 1 for an ordinary token.

    A token's size is the fourth-power mean over channels of its magnitudes, in units of the channel's typical
    magnitude. The typical magnitude is the squared mean of square roots, on which a few outlier tokens have little
    effect. The fourth power gives weight to a token's largest channels, so a token that is huge in a few channels only
    is scaled too, by less; of the powers measured it was the best.
    """
    magnitude = values.abs()
    typical = magnitude.sqrt().mean(1, keepdim=True).square_()  # (I, 1, C)
    largest = magnitude.amax(1, keepdim=True)
    inverse = inverse_or_zero(torch.maximum(typical, largest.mul_(SMALLEST_TYPICAL_SHARE)))
    relative = magnitude.mul_(inverse).square_()  # at most 256**2: nothing overflows
    return outlier_scale(torch.linalg.vector_norm(relative, dim=-1).sqrt_())


def _encode_channels(values: Tensor, codes: Tensor, affine: Tensor) -> None:
    """Write int8 codes (I, K, C) and float32 affine (I, 2, C) of float32 values (I, K, C), minimum to maximum."""
    low = values.amin(1, keepdim=True)  # (I, 1, C)
    step = (values.amax(1, keepdim=True) - low) / STEPS
    # A constant channel (or one narrower than float32 can divide) gets step 0 and is its offset.
    step = torch.where(step < TINY, 0.0, step)
    inverse = torch.where(step == 0, 0.0, 1.0 / step)
    codes.copy_(torch.addcmul(torch.full_like(low, INT8_MIN), values - low, inverse).round_())
    # Computed from the zeroed step: there every code is -128, and the offset must be the minimum itself.
    torch.cat([step, low - INT8_MIN * step], dim=1, out=affine)


def not_storable(bad: Tensor, what: str, expected: str) -> ClipError:
    """Return the error that names the first index where `bad` is True, or none where it is nowhere."""
    places = bad.nonzero()
    index = tuple(int(i) for i in places[0]) if len(places) else ()
    where = f" at index {index}" if index else ""
    return ClipError(
        f"{what}{where} cannot be stored: got values that are not finite or out of range, "
        f"expected {expected}; check the clip's frames and the tower's weights"
    )


def _raise_for_first(bad: Tensor, what: str, expected: str) -> None:
    """Raise a ClipError naming the first index where `bad` is True, if there is one."""
    if bool(bad.any()):
        raise not_storable(bad, what, expected)


def _check_codes(codes: Tensor | npt.NDArray[Any]) -> None:
    if str(codes.dtype).removeprefix("torch.") not in ("int8", "uint8") or codes.ndim < 3:
        raise UsageError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}; frame differences need int8 or uint8 of "
            "shape (..., frames, rows, columns): only 8-bit storage is differenced"
        )


def _copy(codes: CodesT) -> CodesT:
    source: Any = codes
    duplicate: Any = source.clone() if isinstance(source, Tensor) else source.copy()
    return cast(CodesT, duplicate)
