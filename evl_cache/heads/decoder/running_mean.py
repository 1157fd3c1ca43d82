"""Softmax-weighted mean of tokens that arrive in chunks, and the products it is made of.

B clips, H heads, C channels, K tokens of a chunk. The method is that of online softmax (arXiv 1805.02867).
"""

import torch
from torch import Tensor


class RunningMean:
    """sum(exp(logit) token) / sum(exp(logit)), without overflow and without the logits' maximum in advance.

    Args:
        like: a tensor (B, H, C), for shape, dtype (of all sums) and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._total, self._space = torch.zeros_like(like), torch.empty_like(like)
        self._weight = like.new_zeros(*like.shape[:2], 1)
        self._maximum = like.new_full((*like.shape[:2], 1), -torch.inf)

    def add(self, logits: Tensor, tokens: Tensor) -> None:
        """logits: (B, H, K); tokens: (B, K, C), floating, perhaps of lower precision."""
        maximum = torch.maximum(self._maximum, logits.amax(-1, keepdim=True))
        decay = torch.exp(self._maximum - maximum)
        weights = torch.exp(logits - maximum)
        self._weight = self._weight * decay + weights.sum(-1, keepdim=True)
        self._total.mul_(decay)
        add_products(self._total, weights, tokens, self._space)
        self._maximum = maximum

    def mean(self) -> Tensor:
        """(B, H, C)."""
        return self._total / self._weight

    def log_total(self) -> Tensor:
        """Logarithm of the sum of all exponentials, (B, H, 1)."""
        return self._maximum + torch.log(self._weight)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place, for matrices. Multiplied in b's precision, added in total's."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a.to(b.dtype), b))


def add_products(totals: Tensor, a: Tensor, b: Tensor, space: Tensor) -> None:
    """totals += a @ b in place, for batches of matrices. Multiplied in b's precision, added in totals'.

    space: memory like totals, overwritten.
    """
    # Not baddbmm_: on a CPU it multiplies such batches one by one.
    products = torch.bmm(a, b, out=space) if b.dtype == totals.dtype else torch.bmm(a.to(b.dtype), b)
    totals.add_(products)
