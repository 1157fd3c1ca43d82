"""Average pooling of all tokens, and a linear layer.

B clips, C channels.
Source: the average pooling that attentive probes are compared with (V-JEPA, arXiv 2404.08471).
"""

from torch import Tensor

from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.heads.linear import LinearHead


class MeanPoolHead(LinearHead):
    """All tokens of all frames averaged, where `LinearHead` averages class tokens."""

    class_tokens_only = False

    def pooled(self, tokens: LayerTokens) -> Tensor:
        """See `LinearHead.pooled`."""
        return tokens.mean
