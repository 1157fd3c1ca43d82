"""Adjacent-frame attention maps: where a patch of one frame finds itself in the frame before and after.

B clips, T frames, P patches, N = 1+P tokens, C channels, H heads, D head width.
Source: section 3.3 of arXiv 2208.03550.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from evl_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MapProjection:
    """What turns the tokens below a frozen block into its queries and keys: its ln_1 and half its projection.

    Attributes:
        norm_weight, norm_bias: float32 (C,). norm_eps: of the norm.
        weight: (2 H D, C), queries above keys; bias: float32 (2 H D,).
        num_heads: H.
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
        """The same on another device."""
        return replace(
            self,
            norm_weight=self.norm_weight.to(device),
            norm_bias=self.norm_bias.to(device),
            weight=self.weight.to(device),
            bias=self.bias.to(device),
        )


def adjacent_frame_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Attention of each frame's patch queries over the neighbouring frame's patch keys, mean over heads.

    Args:
        q, k: (B, T, 1+P, H, D), class token first, T >= 2. The class token takes no part.

    Returns: (B, 2, T-1, P, P), dtype of q: [:, 0, t] is frame t+1 against frame t ("prev"),
        [:, 1, t] is frame t against frame t+1 ("next"). Each row sums to one. The softmax is taken in
        float32 whatever the dtype.
    Raises: UsageError for unequal shapes or a single frame.
    """
    if q.shape != k.shape or q.ndim != 5:
        raise UsageError(
            f"q is {tuple(q.shape)} and k is {tuple(k.shape)}; expected the same (B, T, 1+P, H, D) twice"
        )
    return patch_maps(q[:, :, 1:], k[:, :, 1:])


def patch_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The same of patches alone. q, k: (B, T, P, H, D). Raises: UsageError for a single frame."""
    if q.shape[1] < 2:
        raise UsageError("adjacent-frame maps of 1 frame: expected at least 2 frames")
    scaled = q.permute(0, 1, 3, 2, 4) * q.shape[-1] ** -0.5  # (B,T,H,P,D)
    keys = k.permute(0, 1, 3, 4, 2)  # (B,T,H,D,P)
    maps = q.new_empty(q.shape[0], 2, q.shape[1] - 1, q.shape[2], q.shape[2])
    for clip in range(q.shape[0]):  # one clip at a time: the per-head maps are H times the result
        maps[clip, 0] = _mean_attention(scaled[clip, 1:], keys[clip, :-1])
        maps[clip, 1] = _mean_attention(scaled[clip, :-1], keys[clip, 1:])
    return maps


@torch.no_grad()
def maps_from_tokens(below: torch.Tensor, projection: MapProjection) -> torch.Tensor:
    """The maps of a block from the tokens one block below.

    Args:
        below: (B, T, 1+P, C), class token first, T >= 2. projection: of the block, on the same device.

    Returns: float32 (B, 2, T-1, P, P), computed in float32 outside any autocast; see `adjacent_frame_maps`.
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


def _mean_attention(q: torch.Tensor, k_transposed: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k_transposed)  # (T-1,H,P,P)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).mean(dim=1)
