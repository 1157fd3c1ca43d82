"""Seeded features and maps with the statistics that make CLIP hard to quantise, and the error to judge by.

Legend: `B` clips, `L` layers, `T` frames, `N` = 1 + P tokens (class token first), `P` patches, `C` channels.

No weights are needed: a few channels are 20 to 100 times the rest, a few tokens (registers) are ten times the
rest in every channel, and neighbouring frames are correlated 0.9.

    python -m benchmarks.outlier_features --json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from evl_cache.quantize import dequantize_maps, dequantize_tokens, quantize_maps, quantize_tokens

FRAME_CORRELATION = 0.9
OUTLIER_CHANNELS_SHARE = 1 / 128  # 6 of 768
REGISTER_SHARE = 1 / 49  # 4 of 196
REGISTER_GAIN = 10.0


@dataclass(frozen=True, kw_only=True)
class OutlierFeatures:
    """`tokens` (B, L, T, N, C) float32 and `is_register` (B, L, T, N) bool, True for outlier tokens."""

    tokens: Tensor
    is_register: Tensor


@dataclass(frozen=True, kw_only=True)
class ChannelError:
    """Worst channel's relative L2 error: against its values as they are, and against their deviation."""

    relative: float
    relative_to_deviation: float


def outlier_features(
    *, clips: int, frames: int = 8, patches: int = 196, channels: int = 768, layers: int = 5, seed: int
) -> OutlierFeatures:
    """Features of `clips` clips. One seed gives one tensor; channel scales and means are shared by the clips.

    Ordinary channels differ by a factor of about two; their means are about half their deviations. Register
    tokens sit at the same patches in all frames and layers and are whole tokens times ten, mean included.
    """
    generator = torch.Generator().manual_seed(seed)
    channel_scale = _normal((layers, channels), generator).mul(0.3).exp()
    num_outliers = max(1, round(channels * OUTLIER_CHANNELS_SHARE))
    outliers = torch.randperm(channels, generator=generator)[:num_outliers]  # the same ones in every layer
    channel_scale[:, outliers] = 20 + 80 * torch.rand((layers, num_outliers), generator=generator)
    mean = 0.5 * _normal((layers, channels), generator)
    shape = (clips, layers, frames, 1 + patches)
    deviation = _normal((*shape, channels), generator)
    for frame in range(1, frames):
        fresh = (1 - FRAME_CORRELATION**2) ** 0.5 * deviation[:, :, frame]
        deviation[:, :, frame] = FRAME_CORRELATION * deviation[:, :, frame - 1] + fresh
    is_register = torch.zeros(shape, dtype=torch.bool)
    num_registers = max(1, round(patches * REGISTER_SHARE))
    for clip in range(clips):
        places = 1 + torch.randperm(patches, generator=generator)[:num_registers]
        is_register[clip, :, :, places] = True
    tokens = (mean[:, None, None] + deviation) * channel_scale[:, None, None]
    tokens = tokens * torch.where(is_register, REGISTER_GAIN, 1.0).unsqueeze(-1)
    return OutlierFeatures(tokens=tokens, is_register=is_register)


def softmax_maps(*, clips: int, frames: int = 8, patches: int = 196, layers: int = 5, seed: int) -> Tensor:
    """Maps (B, L, 2, T-1, P, P) float32: rows sum to one; some are nearly flat, some nearly one-hot."""
    generator = torch.Generator().manual_seed(seed)
    logits = _normal((clips, layers, 2, frames - 1, patches, patches), generator)
    sharpness = 0.05 * 200 ** torch.rand((clips, layers, 2, frames - 1, patches, 1), generator=generator)
    return torch.softmax(logits * sharpness, dim=-1)  # sharpness 0.05 (flat) to 10 (peaked)


def channel_error(reference: Tensor, decoded: Tensor, token_mask: Tensor | None = None) -> ChannelError:
    """Largest, over items and channels, of the L2 error over tokens divided by the reference's L2.

    `reference` and `decoded` (..., T, N, C); `token_mask` (..., T, N) bool keeps the tokens that count. An
    item is one leading index; a channel that is zero throughout counts only if it does not come back as zero.
    """
    keep = torch.ones(reference.shape[:-1]) if token_mask is None else token_mask.float()
    keep = keep.flatten(-2).unsqueeze(-1)  # (..., T*N, 1)
    values = reference.flatten(-3, -2)  # (..., T*N, C)
    error = ((decoded.flatten(-3, -2) - values) * keep).norm(dim=-2)  # (..., C)
    mean = (values * keep).sum(-2, keepdim=True) / keep.sum(-2, keepdim=True)
    return ChannelError(
        relative=_worst_ratio(error, (values * keep).norm(dim=-2)),
        relative_to_deviation=_worst_ratio(error, ((values - mean) * keep).norm(dim=-2)),
    )


def worst_channel_error(reference: Tensor, decoded: Tensor, token_mask: Tensor | None = None) -> float:
    """`channel_error(...).relative`: the figure that a quantisation is judged by."""
    return channel_error(reference, decoded, token_mask).relative


def _worst_ratio(error: Tensor, size: Tensor) -> float:
    ratio = torch.where(error == 0, 0.0, error / size)
    return float(ratio.max())


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def measure(*, clips: int, seed: int) -> dict[str, float]:
    """Errors of both storages on `clips` ViT-B/16 clips, in percent."""
    features = outlier_features(clips=clips, seed=seed)
    ordinary = ~features.is_register
    result: dict[str, float] = {}
    for name, token_scale in (("with_token_scale", True), ("without_token_scale", False)):
        stored = quantize_tokens(features.tokens, token_scale=token_scale)
        decoded = dequantize_tokens(stored.codes, stored.affine, stored.scale)
        every, plain = (channel_error(features.tokens, decoded, mask) for mask in (None, ordinary))
        total = (decoded - features.tokens).norm() / features.tokens.norm()
        result[f"{name}_total_percent"] = 100 * float(total)
        result[f"{name}_worst_channel_percent"] = 100 * every.relative
        result[f"{name}_worst_channel_ordinary_percent"] = 100 * plain.relative
        result[f"{name}_worst_channel_ordinary_deviation_percent"] = 100 * plain.relative_to_deviation
    maps = softmax_maps(clips=clips, seed=seed)
    stored_maps = quantize_maps(maps)
    decoded_maps = dequantize_maps(stored_maps.codes, stored_maps.row_max)
    row_error = (decoded_maps - maps).norm(dim=-1) / maps.norm(dim=-1)
    result["maps_total_percent"] = 100 * float((decoded_maps - maps).norm() / maps.norm())
    result["maps_worst_row_percent"] = 100 * float(row_error.max())
    return result


def main() -> None:
    """Print the measured errors; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description="Quantisation errors on features with CLIP-like outliers.")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    result = measure(clips=options.clips, seed=options.seed)
    if not options.json:
        for name, percent in result.items():
            print(f"{name:60s} {percent:7.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
