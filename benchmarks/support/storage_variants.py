"""Ways of storing tokens and maps that the rate-distortion study compares; most of them are in no product.

Legend: `T` frames, `N` = 1 + P tokens, `P` patches, `C` channels. One item is one (sample, layer). What the
product stores is taken from the product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numcodecs import zstd
from torch import Tensor

from evl_cache.quantize import (
    INT8_MIN,
    QuantizedTokens,
    dequantize_maps,
    dequantize_tokens,
    frame_difference,
    frame_sum_,
    quantize_maps,
    quantize_tokens,
)

GROUP = 32  # channels that share a scale


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One item as it would be stored.

    Attributes:
        arrays: what a codec gets. raw_nbytes: without a codec, codes of fewer than 8 bits packed.
        decode: the item, float32, from arrays of the same shapes.
    """

    arrays: tuple[np.ndarray, ...]
    raw_nbytes: int
    decode: Callable[[Sequence[np.ndarray]], Tensor]

    def value(self) -> Tensor:
        """What a reader gets."""
        return self.decode(self.arrays)


def compress(coded: Coded, level: int) -> list[bytes]:
    """The arrays as zstd frames with checksum, as the store writes them."""
    return [bytes(zstd.compress(array.tobytes(), level, True)) for array in coded.arrays]


def decompress(frames: Sequence[bytes], like: Coded) -> list[np.ndarray]:
    """The inverse of `compress`."""
    return [
        np.frombuffer(zstd.decompress(frame), dtype=array.dtype).reshape(array.shape)
        for frame, array in zip(frames, like.arrays, strict=True)
    ]


def fewer_bits(tokens: Tensor, bits: int) -> QuantizedTokens:
    """Tokens (..., T, N, C) at `bits` bits: the product's affine and token scale, with a coarser step.

    A code counts steps from the channel's minimum, minus 128: what reads int8 tokens reads these too.
    """
    stored = quantize_tokens(tokens)
    if bits == 8:
        return stored
    ratio = 255 / (2**bits - 1)
    steps = ((stored.codes.float() - INT8_MIN) / ratio).round()  # 0 .. 2^bits - 1
    scale, offset = stored.affine.unbind(-2)
    low = offset + INT8_MIN * scale
    affine = torch.stack([scale * ratio, low - INT8_MIN * scale * ratio], dim=-2)
    return QuantizedTokens(codes=(steps + INT8_MIN).to(torch.int8), affine=affine, scale=stored.scale)


def affine_tokens(tokens: Tensor, *, bits: int = 8, difference: bool) -> Coded:
    """Tokens (T, N, C) at 8, 6 or 4 bits, affine per channel."""
    stored = fewer_bits(tokens, bits)
    assert stored.scale is not None
    codes = stored.codes.numpy()
    if difference:
        codes = frame_difference(codes)

    def decode(arrays: Sequence[np.ndarray]) -> Tensor:
        found, affine, scale = map(np.array, arrays)
        if difference:
            frame_sum_(found)
        return dequantize_tokens(*map(torch.from_numpy, (found, affine, scale)))

    small = (stored.affine.numpy(), stored.scale.numpy())
    raw = codes.size * bits // 8 + sum(array.nbytes for array in small)
    return Coded(arrays=(codes, *small), raw_nbytes=raw, decode=decode)


def grouped_int4(tokens: Tensor, *, difference: bool) -> Coded:
    """Tokens (T, N, C) as int4 in groups of 32 channels of a token, after each channel is made of size 1.

    `value = code / 7 * group_scale * channel_deviation + channel_mean`; codes -7 .. 7.
    """
    flat = tokens.float().flatten(0, 1)  # (T*N,C)
    mean, deviation = flat.mean(0), flat.std(0).clamp_min(1e-12)
    groups = ((tokens.float() - mean) / deviation).unflatten(-1, (-1, GROUP))  # (T,N,G,32)
    top = groups.abs().amax(-1, keepdim=True).clamp_min(1e-6).half()
    codes = (groups / top.float() * 7).round().clamp(-7, 7).to(torch.int8).flatten(-2).numpy()
    if difference:
        codes = _signed(frame_difference(codes))

    def decode(arrays: Sequence[np.ndarray]) -> Tensor:
        nibbles, scale, calibration = arrays
        found = np.array(nibbles)
        if difference:
            frame_sum_(found)
            found = _signed(found)
        steps = torch.from_numpy(found).float().unflatten(-1, (-1, GROUP))
        values = (steps / 7 * torch.from_numpy(np.array(scale)).float()).flatten(-2)
        return values * torch.from_numpy(calibration[0].copy()) + torch.from_numpy(calibration[1].copy())

    small = (top.numpy(), torch.stack([deviation, mean]).numpy())
    raw = codes.size // 2 + sum(array.nbytes for array in small)
    return Coded(arrays=(codes, *small), raw_nbytes=raw, decode=decode)


def fp16(values: Tensor) -> Coded:
    """Tokens or maps as float16."""
    halves = values.half().numpy()
    return Coded(
        arrays=(halves,),
        raw_nbytes=halves.nbytes,
        decode=lambda arrays: torch.from_numpy(np.array(arrays[0])).float(),
    )


def sqrt_maps(maps: Tensor, *, bits: int = 8) -> Coded:
    """Maps (2, T-1, P, P) at 8 or 4 bits of the square root, scaled by the row maximum."""
    if bits == 8:
        stored = quantize_maps(maps)
        arrays = (stored.codes.numpy(), stored.row_max.numpy())
        return Coded(
            arrays=arrays,
            raw_nbytes=sum(array.nbytes for array in arrays),
            decode=lambda found: dequantize_maps(*(torch.from_numpy(np.array(a)) for a in found)),
        )
    row_max = maps.amax(-1).half()
    gain = 15 / row_max.float().clamp_min(1e-7).sqrt()
    codes = (maps.sqrt() * gain.unsqueeze(-1)).round().clamp(0, 15).to(torch.uint8)
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).numpy()  # P is even

    def decode(found: Sequence[np.ndarray]) -> Tensor:
        pairs, top = (torch.from_numpy(np.array(a)) for a in found)
        steps = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).float() / 15
        return steps * steps * top.float().unsqueeze(-1)

    arrays = (packed, row_max.numpy())
    return Coded(arrays=arrays, raw_nbytes=sum(array.nbytes for array in arrays), decode=decode)


def _signed(values: np.ndarray) -> np.ndarray:
    """The low four bits of each value as a number in -8 .. 7."""
    return ((values.astype(np.int8) + 8) & 15).astype(np.int8) - np.int8(8)
