"""A linear probe on class tokens: the cheapest head, and the baseline of all others.

B clips, T frames, C channels, L layers.
Source: the linear probe of CLIP (arXiv 2103.00020, section 3.2) on the mean over frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import Head
from evl_cache.heads.layer_tokens import LayerTokens


class LinearHead(Head):
    """Class tokens averaged over frames, normalised, and a linear layer; several layers are put side by side."""

    default_depth = 1
    class_tokens_only = True

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.norms = nn.ModuleList(nn.LayerNorm(self.width) for _ in range(self.num_layers))
        self.dropout = Dropout(self.config["dropout"])
        self.classifier = nn.Linear(self.num_layers * self.width, self.num_classes)

    def pooled(self, tokens: LayerTokens) -> Tensor:
        """Return what a layer's tokens are averaged to, (B, C)."""
        return tokens.class_tokens.mean(1)

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """See `Head.logits`."""
        pooled = [norm(self.pooled(layer)) for norm, layer in zip(self.norms, tokens, strict=True)]
        result: Tensor = self.classifier(self.dropout(torch.cat(pooled, dim=-1)))
        return result
