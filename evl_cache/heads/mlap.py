"""Multi-layer attention pooling: one pooler for each layer refines a query, shallow to deep.

B clips, T frames, N tokens of a frame, C channels, L layers.
Source: the frozen adaptation with a multi-layer attention pooler of VideoGLUE (arXiv 2307.03166).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import Head
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.heads.parts import MLP, QueryAttention, normalised

INITIAL_DEVIATION = 0.02


class LayerPooler(nn.Module):
    """`q = q + attn(LN q, LN tokens); q = q + mlp(LN q)`, with a learned position of each frame or without."""

    def __init__(self, width: int, num_heads: int, positions: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.mlp = QueryAttention(width, num_heads), MLP(width)
        self.pos_embed = None if positions is None else nn.Parameter(torch.zeros(positions, width))

    def forward(self, query: Tensor, tokens: LayerTokens) -> Tensor:
        """Return the next query, (B, C) as `query` is."""
        if self.pos_embed is None:
            memory = normalised(tokens, self.norm3)  # (B,T,N,C)
        else:
            memory = self.norm3(tokens.values + self.pos_embed[:, None])
        query = query + self.attention(self.norm1(query), memory.flatten(1, 2))
        result: Tensor = query + self.mlp(self.norm2(query))
        return result


class MLAPHead(Head):
    """A cascade over all layers: each layer's pooler refines the query that the one before returned.

    Args, beside those of `Head`:
        temporal_pos_embed: whether every pooler has a learned position of each frame; an image tower has none.
    """

    temporal_modules = ("temporal_pos_embed",)

    def __init__(self, *, temporal_pos_embed: bool = True, **config: Any) -> None:
        super().__init__(temporal_pos_embed=temporal_pos_embed, **config)
        positions = self.num_frames if temporal_pos_embed else None
        self.query = nn.Parameter(torch.empty(self.width))
        nn.init.trunc_normal_(self.query, std=INITIAL_DEVIATION)
        self.blocks = nn.ModuleList(
            LayerPooler(self.width, self.num_heads, positions) for _ in range(self.num_layers)
        )
        self.norm = nn.LayerNorm(self.width)
        self.dropout = Dropout(self.config["dropout"])
        self.classifier = nn.Linear(self.width, self.num_classes)

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """See `Head.logits`."""
        query = self.query.expand(tokens[0].values.shape[0], -1)  # (B,C)
        for pooler, layer in zip(self.blocks, tokens, strict=True):
            query = pooler(query, layer)
        result: Tensor = self.classifier(self.dropout(self.norm(query)))
        return result
