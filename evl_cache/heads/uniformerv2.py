"""The global blocks of UniFormerV2: a depthwise 3D convolution for each tap, then one query.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, L layers (taps).
Source: UniFormerV2 (arXiv 2211.09552), global UniBlock and sequential multi-stage fusion. Its local blocks are left
out: they sit inside the tower, before each of its layers, and cannot be computed from cached tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evl_cache.heads.decoder.decoder_layer import QuickGELU
from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import Head
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.heads.parts import MLP, QueryAttention, zero


class GlobalBlock(nn.Module):
    """`y = tokens + conv(patches); q = q + attn(LN q, LN y); q = q + mlp(LN q)`; all branches begin as zero."""

    def __init__(self, width: int, num_heads: int, *, temporal_conv: bool) -> None:
        super().__init__()
        self.conv: nn.Conv3d | None = None
        if temporal_conv:
            self.conv = nn.Conv3d(width, width, kernel_size=3, padding=1, groups=width)
            zero(self.conv)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.mlp = QueryAttention(width, num_heads), MLP(width, QuickGELU())
        zero(self.attention.out_proj, self.mlp[-1])

    def forward(self, query: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the next query, (B, C) as `query` is, from tokens (B, T, 1+P, C)."""
        y = tokens if self.conv is None else with_convolution(tokens, self.conv, grid)
        query = query + self.attention(self.norm1(query), self.norm3(y).flatten(1, 2))
        result: Tensor = query + self.mlp(self.norm2(query))
        return result


def with_convolution(tokens: Tensor, conv: nn.Conv3d, grid: tuple[int, int]) -> Tensor:
    """Return tokens (B, T, 1+P, C) plus a convolution of their patches over frames, rows and columns."""
    batch, frames, _, width = tokens.shape
    patches = tokens[:, :, 1:].reshape(batch, frames, *grid, width).permute(0, 4, 1, 2, 3)  # (B,C,T,Hp,Wp)
    moved = conv(patches).flatten(3).permute(0, 2, 3, 1)  # (B,T,P,C)
    return tokens + nn.functional.pad(moved, (0, 0, 1, 0))


class UniFormerV2Head(Head):
    """Each tap refines one query in turn; a learned balance mixes it with the last tap's class tokens.

    Args, beside those of `Head`:
        temporal_conv: whether the global blocks convolve their patches.
    """

    default_depth = 4
    temporal_modules = ("temporal_conv",)

    def __init__(self, *, temporal_conv: bool = True, **config: Any) -> None:
        super().__init__(temporal_conv=temporal_conv, **config)
        self.query = nn.Parameter(torch.zeros(self.width))
        self.blocks = nn.ModuleList(
            GlobalBlock(self.width, self.num_heads, temporal_conv=temporal_conv)
            for _ in range(self.num_layers)
        )
        self.balance = nn.Parameter(torch.zeros(self.width))
        self.norm = nn.LayerNorm(self.width)
        self.dropout = Dropout(self.config["dropout"])
        self.classifier = nn.Linear(self.width, self.num_classes)

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """See `Head.logits`."""
        query = self.query.expand(tokens[0].values.shape[0], -1)  # (B,C)
        for block, layer in zip(self.blocks, tokens, strict=True):
            query = block(query, layer.values, self.grid)
        share = torch.sigmoid(self.balance)
        fused = (1 - share) * query + share * tokens[-1].class_tokens.mean(1)
        result: Tensor = self.classifier(self.dropout(self.norm(fused)))
        return result
