"""Average pooling of all tokens, and a linear layer.

B clips, T frames, N tokens of a frame, C channels, L layers.
Source: the average pooling that attentive probes are compared with (V-JEPA, arXiv 2404.08471).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evl_cache.heads.head import Head
from evl_cache.heads.layer_tokens import LayerTokens


class MeanPoolHead(Head):
    """All T N tokens averaged, normalised, and a linear layer; several layers are put side by side."""

    default_depth = 1

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.norms = nn.ModuleList(nn.LayerNorm(self.width) for _ in range(self.num_layers))
        self.dropout = nn.Dropout(self.config["dropout"])
        self.classifier = nn.Linear(self.num_layers * self.width, self.num_classes)

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """As `Head.logits`."""
        pooled = [norm(t.mean) for norm, t in zip(self.norms, tokens, strict=True)]  # L of (B,C)
        result: Tensor = self.classifier(self.dropout(torch.cat(pooled, dim=-1)))
        return result
