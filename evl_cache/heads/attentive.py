"""The attentive probe: self-attention over all tokens, then one query that pools them.

B clips, T frames, N tokens of a frame, C channels.
Source: the probe of V-JEPA 2 (arXiv 2506.09985). It has four blocks; the last is cross attention with a learned query.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import Head
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.heads.parts import MLP, QueryAttention, SelfAttention

INITIAL_DEVIATION = 0.02


class SelfAttentionBlock(nn.Module):
    """Self-attention and MLP: `x = x + attn(LN x); x = x + mlp(LN x)`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = SelfAttention(width, num_heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return new tokens, (S, K, C) as `x` is."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class QueryBlock(nn.Module):
    """A query reads tokens: `q = q + attn(q, LN tokens); q = q + mlp(LN q)`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = QueryAttention(width, num_heads), MLP(width)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Return the new query, (B, C) as `query` is, from tokens (B, K, C)."""
        query = query + self.attention(query, self.norm1(tokens))
        result: Tensor = query + self.mlp(self.norm2(query))
        return result


class AttentiveHead(Head):
    """The probe on one layer's tokens of all frames.

    Attention does not know the order of frames, so a position of each frame is added.

    Args, beside those of `Head`:
        num_blocks: self-attention blocks before the pooling one.
        temporal_pos_embed: whether to add a learned position of each frame.
    """

    default_depth = 1
    takes_other_depths = False
    temporal_modules = ("temporal_pos_embed",)

    def __init__(self, *, num_blocks: int = 3, temporal_pos_embed: bool = True, **config: Any) -> None:
        super().__init__(num_blocks=num_blocks, temporal_pos_embed=temporal_pos_embed, **config)
        if temporal_pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(self.num_frames, self.width))
        self.blocks = nn.ModuleList(SelfAttentionBlock(self.width, self.num_heads) for _ in range(num_blocks))
        self.query = nn.Parameter(torch.empty(self.width))
        nn.init.trunc_normal_(self.query, std=INITIAL_DEVIATION)
        self.pool = QueryBlock(self.width, self.num_heads)
        self.dropout = Dropout(self.config["dropout"])
        self.classifier = nn.Linear(self.width, self.num_classes)

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """See `Head.logits`."""
        x = tokens[0].values  # (B,T,N,C)
        if self.config["temporal_pos_embed"]:
            x = x + self.pos_embed[:, None]
        x = x.flatten(1, 2)  # (B,T*N,C)
        for block in self.blocks:
            x = block(x)
        pooled = self.pool(self.query.expand(x.shape[0], -1), x)  # (B,C)
        result: Tensor = self.classifier(self.dropout(pooled))
        return result
