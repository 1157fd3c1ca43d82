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

from evl_cache.errors import ClipError, UsageError

CodesT = TypeVar("CodesT", Tensor, npt.NDArray[Any])

STEPS = 255
INT8_MIN = -128

# Values of one pass. A CPU is fastest on 8 MiB of float32, which fit its caches and are reused by the allocator; from 32
# MiB on a pass takes four times as long. Small items share a pass, as all threads must meet after every kernel.
CPU_PASS_VALUES = 2**21
DEVICE_PASS_VALUES = 2**26

# A token of up to this many times the median size costs the others at most log2(1.5) bits, and keeps scale 1.
OUTLIER_RATIO = 1.5

# A channel that is zero except in one token has nearly no typical size. Without this floor that channel alone would make
# the token an enormous outlier, and its other channels would lose precision.
SMALLEST_TYPICAL_SHARE = 1.0 / 256.0


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
    values_per_pass = CPU_PASS_VALUES if tokens.device.type == "cpu" else DEVICE_PASS_VALUES
    step = max(1, values_per_pass // (frames * per_frame * channels))  # items in a pass
    for start in range(0, len(items), step):
        part = slice(start, start + step)
        values = items[part].float()
        if token_scale:
            scale[part] = _token_scale(values)
            # Divide by the rounded scale: it is the one that decoding multiplies by.
            values = values / scale[part].float().unsqueeze(-1)
        codes[part], affine[part] = _encode_channels(values)
    finite = affine.isfinite().flatten(1).all(1) & scale.isfinite().all(1)
    _raise_for_first(~finite.reshape(lead), "tokens", "finite values that int8 codes can span")
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
    values = maps.detach().float()
    row_max = _float16_at_least(values.amax(-1))
    usable = row_max.isfinite() & (values.amin(-1) >= 0)
    _raise_for_first(~usable, "attention maps", "finite values of at least 0 and at most 65504")
    top = row_max.float()
    gain = torch.where(top > 0, STEPS / top.sqrt(), 0.0).unsqueeze(-1)
    # Adding a half and cutting rounds; row_max >= every value, so 255.5 is never passed.
    codes = (values.sqrt().mul_(gain).add_(0.5)).to(torch.uint8)
    return QuantizedMaps(codes=codes, row_max=row_max)


def dequantize_maps(codes: Tensor, row_max: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return maps (..., P) of `out_dtype` from `codes`, uint8 (..., P), and `row_max`, float16 (...)."""
    roots = codes.float() / STEPS
    return (roots * roots * row_max.float().unsqueeze(-1)).to(out_dtype)


def to_float16(values: Tensor, *, what: str = "tokens") -> Tensor:
    """Return values as float16. Raises: ClipError naming `what` and the first index that float16 cannot hold."""
    halves = values.detach().to(torch.float16)
    # The float32 sum of finite float16 values is finite, so one cheap reduction is enough unless something is wrong.
    if not bool(halves.sum(dtype=torch.float32).isfinite()):
        _raise_for_first(~halves.isfinite(), what, "finite values of at most 65504, the largest float16")
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
    typical = magnitude.sqrt().mean(1, keepdim=True).square()  # (I, 1, C)
    typical = torch.maximum(typical, magnitude.amax(1, keepdim=True) * SMALLEST_TYPICAL_SHARE)
    inverse = torch.where(typical == 0, 0.0, 1.0 / typical.clamp_min(torch.finfo(torch.float32).tiny))
    relative = magnitude.mul_(inverse).square_()  # at most 256**2: nothing overflows
    size = torch.linalg.vector_norm(relative, dim=-1).sqrt_()  # (I, K)
    usual = size.median(1, keepdim=True).values
    ratio = size / torch.where(usual > 0, usual, 1.0)
    # `~(<=)` and not `>`: a token that is not finite must not count as ordinary.
    outlier = ~(ratio <= OUTLIER_RATIO) & ~(usual == 0)
    return torch.where(outlier, ratio, 1.0).to(torch.float16)


def _encode_channels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (I, K, C) and float32 affine (I, 2, C) of float32 values (I, K, C), minimum to maximum."""
    low = values.amin(1, keepdim=True)  # (I, 1, C)
    step = (values.amax(1, keepdim=True) - low) / STEPS
    # A constant channel (or one narrower than float32 can divide) gets step 0 and is its offset.
    step = torch.where(step < torch.finfo(torch.float32).tiny, 0.0, step)
    inverse = torch.where(step == 0, 0.0, 1.0 / step)
    codes = torch.addcmul(torch.full_like(low, INT8_MIN), values - low, inverse).round_().to(torch.int8)
    # Computed from the zeroed step: there every code is -128, and the offset must be the minimum itself.
    affine = torch.cat([step, low - INT8_MIN * step], dim=1)
    return codes, affine


def _float16_at_least(values: Tensor) -> Tensor:
    """Return the smallest float16 not below each of `values` (not negative), so that a row's codes never pass 255."""
    halves = values.to(torch.float16)
    next_up = (halves.view(torch.int16) + 1).view(torch.float16)  # adjacent bit patterns are adjacent numbers
    return torch.where(halves.float() < values, next_up, halves)


def _raise_for_first(bad: Tensor, what: str, expected: str) -> None:
    """Raise a ClipError naming the first index where `bad` is True, if there is one."""
    if not bool(bad.any()):
        return
    index = tuple(int(i) for i in bad.nonzero()[0])
    where = f" at index {index}" if index else ""
    raise ClipError(
        f"{what}{where} cannot be stored: got values that are not finite or out of range, "
        f"expected {expected}; check the clip's frames, or compute in float32 if half precision overflows"
    )


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
