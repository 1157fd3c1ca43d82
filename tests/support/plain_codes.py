"""Codes of tokens and maps made the plain way: whole items, one torch operation after another. What is fast must equal it."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, INT8_MIN, OUTLIER_RATIO, SMALLEST_TYPICAL_SHARE = 255, -128, 1.5, 1.0 / 256.0


def plain_token_codes(tokens: Tensor, *, token_scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes int8 (..., T, N, C), affine (..., 2, C) and scale float16 (..., T, N), whatever the values are."""
    *lead, frames, per_frame, channels = tokens.shape
    values = tokens.detach().reshape(-1, frames * per_frame, channels).float()
    scale = torch.ones(values.shape[:2], dtype=torch.float16)
    if token_scale:
        scale = _token_scale(values)
        values = values / scale.float().unsqueeze(-1)
    codes, affine = _encode_channels(values)
    return (
        codes.reshape(tokens.shape),
        affine.reshape(*lead, 2, channels),
        scale.reshape(*lead, frames, per_frame),
    )


def plain_map_codes(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 (..., P), row_max float16 (...), and whether each row can be stored (...)."""
    values = maps.detach().float()
    row_max = _float16_at_least(values.amax(-1))
    usable = row_max.isfinite() & (values.amin(-1) >= 0)
    top = row_max.float()
    gain = torch.where(top > 0, STEPS / top.sqrt(), 0.0).unsqueeze(-1)
    return (values.sqrt().mul_(gain).add_(0.5)).to(torch.uint8), row_max, usable


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
