"""Adjacent-frame attention maps: where a patch of one frame is found in the frames before and after.

B clips, T frames, P patches, N = 1+P tokens, C channels, H heads, D head width.
Source: section 3.3 of arXiv 2208.03550.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from evl_cache.errors import UsageError

_DEVICE_SHARE = 1 / 8  # of a device's memory, that maps may take while they are made
_USUAL_NBYTES = 80 << 30  # of a device that does not tell
_FLOAT32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class MapProjection:
    """What computes a frozen layer's queries and keys from the tokens below it: its first norm and a matrix.

    Attributes:
        norm_weight: gain of the norm, float32 (C,).
        norm_bias: shift of the norm, float32 (C,).
        norm_eps: epsilon of the norm.
        weight: rows of queries, then of keys, (2 H D, C).
        bias: likewise, float32 (2 H D,).
        num_heads: attention heads H.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    norm_eps: float
    weight: torch.Tensor
    bias: torch.Tensor
    num_heads: int

    def __post_init__(self) -> None:
        rows, channels = self.weight.shape
        assert rows % (2 * self.num_heads) == 0, f"{rows} rows for {self.num_heads} heads"
        assert self.norm_weight.shape == self.norm_bias.shape == (channels,)
        assert self.bias.shape == (rows,)

    def to(self, device: torch.device | str) -> "MapProjection":
        """Return the same projection on another device."""
        return replace(
            self,
            norm_weight=self.norm_weight.to(device),
            norm_bias=self.norm_bias.to(device),
            weight=self.weight.to(device),
            bias=self.bias.to(device),
        )


def adjacent_frame_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return each frame's attention of patch queries over the patch keys of its neighbours, as a mean over heads.

    The class token takes no part. The softmax is computed in float32 for every dtype.

    Args:
        q: queries, (B, T, 1+P, H, D), class token first, T >= 2.
        k: keys, likewise.

    Returns: (B, 2, T-1, P, P) in the dtype of q. [:, 0, t] is frame t+1 against frame t ("prev"), [:, 1, t] is frame t
        against frame t+1 ("next"). Each row sums to one.
    Raises: UsageError for unequal shapes or a single frame.
    """
    if q.shape != k.shape or q.ndim != 5:
        raise UsageError(
            f"q is {tuple(q.shape)} and k is {tuple(k.shape)}; expected the same (B, T, 1+P, H, D) twice"
        )
    return patch_maps(q[:, :, 1:], k[:, :, 1:])


def patch_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the maps of `adjacent_frame_maps` from queries and keys of patches alone, (B, T, P, H, D) each.

    Raises: UsageError for a single frame.
    """
    if q.shape[1] < 2:
        raise UsageError(
            "adjacent-frame maps of 1 frame; expected at least 2 frames: use more, or --maps none"
        )
    scaled = q.permute(0, 1, 3, 2, 4) * q.shape[-1] ** -0.5  # (B,T,H,P,D)
    keys = k.permute(0, 1, 3, 4, 2)  # (B,T,H,D,P)
    maps = q.new_empty(q.shape[0], 2, q.shape[1] - 1, q.shape[2], q.shape[2])
    # The maps of all heads are H times as large as the result.
    for some in parts_of(len(q), device=q.device, clip_nbytes=_attention_nbytes(q.shape, q.element_size())):
        maps[some, 0] = _mean_attention(scaled[some, 1:], keys[some, :-1])
        maps[some, 1] = _mean_attention(scaled[some, :-1], keys[some, 1:])
    return maps


@torch.no_grad()
def maps_from_tokens(below: torch.Tensor, projection: MapProjection) -> torch.Tensor:
    """Return the maps of a layer from the tokens one layer below, computed in float32 outside any autocast.

    Args:
        below: (B, T, 1+P, C), class token first, T >= 2.
        projection: of the layer, on the same device.

    Returns: float32 (B, 2, T-1, P, P); see `adjacent_frame_maps`.
    """
    with torch.autocast(below.device.type, enabled=False):
        tokens = F.layer_norm(
            below.float(),
            (below.shape[-1],),
            projection.norm_weight,
            projection.norm_bias,
            projection.norm_eps,
        )
        qk = F.linear(tokens, projection.weight.float(), projection.bias)  # (B,T,N,2HD)
        q, k = qk.view(*qk.shape[:3], 2, projection.num_heads, -1).unbind(3)
        return adjacent_frame_maps(q, k)


def projection_nbytes(tokens_shape: Sequence[int], num_heads: int) -> int:
    """Return the bytes that `maps_from_tokens` takes for a clip of tokens (…, T, 1+P, C), beside these and its result."""
    frames, per_frame, channels = tokens_shape[-3:]
    heads = (1, frames, per_frame - 1, num_heads, channels // num_heads)
    values = 5 * frames * per_frame * channels  # decoded, normalised, queries and keys, scaled queries
    return values * _FLOAT32 + _attention_nbytes(heads, _FLOAT32)


def parts_of(clips: int, *, device: torch.device, clip_nbytes: int) -> list[slice]:
    """Split clips into those that are worked on at a time: on a CPU one, on another device as many as memory is for.

    One fits into a processor's cache. Another device wants few launches, each with much to do.

    Args:
        clips: how many there are.
        clip_nbytes: bytes that one takes meanwhile.
    """
    most = 1 if device.type == "cpu" else max(1, int(_device_nbytes(device)) // clip_nbytes)
    count = -(-clips // most)  # of parts, nearly equal ones
    bounds = [clips * part // count for part in range(count + 1)] if count else [0]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _device_nbytes(device: torch.device) -> float:
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return _DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory
    return _DEVICE_SHARE * _USUAL_NBYTES


def _attention_nbytes(shape: Sequence[int], element_size: int) -> int:
    """Return the bytes that `_mean_attention` takes for a clip of queries (1, T, P, H, D), beside these and its result."""
    _, frames, patches, heads, width = shape
    operands = 2 * patches * width  # queries and keys in one piece
    return (frames - 1) * heads * (element_size * (operands + patches**2) + _FLOAT32 * patches**2)


def _mean_attention(q: torch.Tensor, k_transposed: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k_transposed)  # (B,T-1,H,P,P)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).mean(dim=2)
