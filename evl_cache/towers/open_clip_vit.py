"""open_clip's own VisionTransformer: CLIP and models of the same architecture.

S samples (clips times frames), P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from evl_cache.attention_maps import MapProjection
from evl_cache.errors import UsageError
from evl_cache.towers.adapter import KeepQueriesKeys


class OpenClipVit:
    """The adapter of open_clip's own towers; see `TowerAdapter`.

    Raises: UsageError for layers other than open_clip's plain ones.
    """

    class_token, registers = "own", 0

    def __init__(self, visual: nn.Module) -> None:
        tower: Any = visual
        self._visual, self._blocks = tower, tower.transformer.resblocks
        if not all(type(block).__name__ == "ResidualAttentionBlock" for block in self._blocks):
            raise UsageError(
                f"the tower's layers are {type(self._blocks[0]).__name__}; expected open_clip's ResidualAttentionBlock: "
                "queries and keys of custom layers are not those of the published method"
            )
        self.image_size: tuple[int, int] = tuple(tower.image_size)
        self.patch_size: tuple[int, int] = tuple(tower.patch_size)
        self.width = int(tower.conv1.out_channels)
        self.num_layers = len(self._blocks)
        self.num_heads = int(self._blocks[0].attn.num_heads)

    @property
    def dtype(self) -> torch.dtype:
        """See `TowerAdapter.dtype`."""
        dtype: torch.dtype = self._visual.conv1.weight.dtype
        return dtype

    def tokens(
        self, frames: torch.Tensor, layers: Sequence[int], keep: KeepQueriesKeys | None
    ) -> dict[int, torch.Tensor]:
        """See `TowerAdapter.tokens`; queries and keys come from the projection that the layer computes anyway."""
        x = self._visual._embeds(frames)
        out = {}
        for number in range(1, max(layers) + 1):
            x, q, k = _layer_forward(self._blocks[number - 1], x)
            if number in layers:
                out[number] = x
                if keep is not None:
                    keep(number, q[:, 1:], k[:, 1:])
        return out

    def projection(self, layer: int, compute_dtype: torch.dtype) -> MapProjection:
        """See `TowerAdapter.projection`; it is the layer's ln_1 and the first two thirds of its in-projection."""
        norm, attn = self._blocks[layer - 1].ln_1, self._blocks[layer - 1].attn
        rows = 2 * attn.embed_dim
        return rounded_projection(
            norm, attn.in_proj_weight[:rows], attn.in_proj_bias[:rows], int(attn.num_heads), compute_dtype
        )


def rounded_projection(
    norm: Any, weight: torch.Tensor, bias: torch.Tensor, num_heads: int, compute_dtype: torch.dtype
) -> MapProjection:
    """Return a projection rounded to the dtype in which the tower ran; its matrix is kept in float16.

    `weight` and `bias` hold the rows of queries, then those of keys.
    """

    def kept(value: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return value.detach().to("cpu", compute_dtype).to(dtype).contiguous()

    return MapProjection(
        norm_weight=kept(norm.weight),
        norm_bias=kept(norm.bias),
        norm_eps=float(norm.eps),
        weight=kept(weight, torch.float16),
        bias=kept(bias),
        num_heads=num_heads,
    )


def _layer_forward(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one layer's output for x (S, N, C), and its queries and keys, (S, N, H, D) each."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(*qkv.shape[:2], 3, attn.num_heads, -1).unbind(2)
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + block.ls_1(attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x))), q, k
