"""Temporal convolution and position embedding of a chunk of tokens, forward and backward.

B clips, T frames, C channels, Q tokens of a chunk, which is (Q, T, B, C).
Source: section 3.3 of arXiv 2208.03550.
"""

import torch
from torch import Tensor


class TemporalShift:
    """The sum tokens + conv(tokens) + position, and its gradients, added up over chunks.

    Args:
        taps: of the depthwise convolution, earliest frame first, (3, C); None where it is off.
        shift: the position embedding plus the convolution's bias, (T, C); None where both are off.
    """

    def __init__(self, taps: Tensor | None, shift: Tensor | None) -> None:
        self.taps, self.shift = taps, shift
        self.taps_gradient = None if taps is None else torch.zeros_like(taps)
        self.shift_gradient = None if shift is None else torch.zeros_like(shift)

    def apply(self, tokens: Tensor, out: Tensor) -> Tensor:
        """Write tokens with position into `out` and return it; both are (Q, T, B, C)."""
        if self.taps is None:
            return (
                out.copy_(tokens) if self.shift is None else torch.add(tokens, self.shift[:, None], out=out)
            )
        assert self.shift is not None
        before, here, after = self.taps
        torch.addcmul(self.shift[:, None], tokens, here + 1, out=out)
        out[:, 1:].addcmul_(tokens[:, :-1], before)
        out[:, :-1].addcmul_(tokens[:, 1:], after)
        return out

    def collect(self, gradient: Tensor, tokens: Tensor | None, space: Tensor) -> None:
        """Add the part of a chunk's `gradient` to the gradients of taps, which need the `tokens`, and of shift.

        All are (Q, T, B, C); `space` is overwritten.
        """
        frames, width = gradient.shape[1], gradient.shape[3]
        if self.shift_gradient is not None:
            sums = gradient.flatten(0, 1).sum(1)  # (Q T,C)
            self.shift_gradient += sums.view(-1, frames, width).sum(0)
        if self.taps_gradient is not None:
            assert tokens is not None
            pairs = (gradient[:, 1:], tokens[:, :-1]), (gradient, tokens), (gradient[:, :-1], tokens[:, 1:])
            for tap, (left, right) in zip(self.taps_gradient, pairs, strict=True):
                # Multiplied into dense memory: a sum over a strided view takes twenty times as long.
                product = space.view(-1)[: left.numel()].view_as(left)
                torch.mul(left, right, out=product)
                tap += product.view(-1, width).sum(0)

    def to_tokens(self, gradient: Tensor) -> Tensor:
        """Return the gradient of a chunk's tokens, (Q, T, B, C)."""
        if self.taps is None:
            return gradient
        before, here, after = self.taps
        result: Tensor = gradient * (here + 1)
        result[:, :-1].addcmul_(gradient[:, 1:], before)
        result[:, 1:].addcmul_(gradient[:, :-1], after)
        return result
