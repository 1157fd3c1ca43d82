"""The softmax-weighted mean of tokens that arrive in chunks, and the products that it needs.

B clips, H heads, C channels, K tokens of a chunk. The method is online softmax (arXiv 1805.02867).
"""

import torch
from torch import Tensor

from evl_cache.heads.decoder.products import product


class RunningMean:
    """The quotient sum(exp(logit) token) / sum(exp(logit)), without overflow and in one pass.

    Args:
        like: a tensor with the shape (B, H, C), dtype and device of the sums.
    """

    def __init__(self, like: Tensor) -> None:
        self._total, self._space = torch.zeros_like(like), torch.empty_like(like)
        self._weight = like.new_zeros(*like.shape[:2], 1)
        self._maximum = like.new_full((*like.shape[:2], 1), -torch.inf)

    def add(self, logits: Tensor, tokens: Tensor) -> None:
        """Add tokens (B, K, C), floating and perhaps of lower precision, with their logits (B, H, K)."""
        maximum = torch.maximum(self._maximum, logits.amax(-1, keepdim=True))
        decay = torch.exp(self._maximum - maximum)
        weights = torch.exp(logits - maximum)
        self._weight = self._weight * decay + weights.sum(-1, keepdim=True)
        self._total.mul_(decay)
        add_products(self._total, weights, tokens, self._space)
        self._maximum = maximum

    def mean(self) -> Tensor:
        """Return the mean, (B, H, C)."""
        return self._total / self._weight

    def log_total(self) -> Tensor:
        """Return the logarithm of the sum of all exponentials, (B, H, 1)."""
        return self._maximum + torch.log(self._weight)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the matrix `total` in place, multiplied in b's dtype and added in total's."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a.to(b.dtype), b))


def add_products(totals: Tensor, a: Tensor, b: Tensor, space: Tensor) -> None:
    """Add a @ b to the batch of matrices `totals` in place, multiplied in b's dtype and added in totals'.

    `space` is memory of the same shape and dtype as `totals`; it is overwritten.
    """
    # Not baddbmm_, which multiplies such matrices one by one on a CPU.
    same = b.dtype == totals.dtype
    totals.add_(product(a if same else a.to(b.dtype), b, totals.dtype, out=space))
