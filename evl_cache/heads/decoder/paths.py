"""Which code computes a decoder layer's attention on which device.

Where a compiler or a transform follows the operations, all of these are closed, and `differentiable.py` is used. Else
`chunked` keeps chunks of tokens in a processor's cache. `whole` makes whole tensors in few operations, since a GPU waits
for each. `kernels` reads stored codes in four kernels of Triton; where they do not suit, or were found wrong, `whole` is
used. B clips, H heads, C channels.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from evl_cache.errors import UsageError
from evl_cache.heads.decoder.chunked import path as chunked
from evl_cache.heads.decoder.kernels.choice import are_proved, suits
from evl_cache.heads.decoder.tensors import LayerTensors, Setting
from evl_cache.heads.decoder.whole import path as whole
from evl_cache.heads.tracing import are_ordinary, is_followed, is_watched

VARIABLE = "EVL_CACHE_HEAD_PATH"  # for a machine on which the choice turns out wrong

PATHS = ("chunked", "whole", "kernels")
_forced: list[str] = []


class AttentionPath(Protocol):
    """A module that computes the attention. Autograd and autocast are off."""

    def forward(self, setting: Setting, inputs: LayerTensors) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the mean (B, H, C) in the dtype of sums, and what the backward pass needs, if there will be one."""

    def backward(
        self,
        setting: Setting,
        inputs: LayerTensors,
        kept: Sequence[Tensor],
        gradient: Tensor,
        needed: frozenset[str],
        *,
        again: bool,
    ) -> LayerTensors:
        """Return the gradients of the inputs; None where there is none or it is not needed.

        Args:
            kept: what `forward` returned.
            gradient: of the mean, (B, H, C).
            needed: fields of the inputs whose gradients are needed.
            again: whether there will be another backward pass: then `kept` must not be written over.
        """


def are_closed(setting: Setting, inputs: LayerTensors) -> bool:
    """Whether no path can compute this: whoever follows the operations needs others.

    On a processor that includes modes and tensors of other classes, which the threads of `chunked` would lose.
    """
    if is_followed():
        return True
    if setting.device.type != "cpu" or _forced:
        return False
    return is_watched() or not are_ordinary(*inputs.clips, *inputs.shared)


def path_for(setting: Setting, inputs: LayerTensors) -> AttentionPath:
    """Return the path that suits the device and the inputs.

    Raises: UsageError where the environment names one that does not exist.
    """
    name = _forced[-1] if _forced else os.environ.get(VARIABLE) or _suiting(setting, inputs)
    if name == "kernels":
        from evl_cache.heads.decoder.kernels import path as kernels  # Triton is needed for no other path

        return kernels
    if name not in PATHS:
        raise UsageError(f"{VARIABLE} is {name!r}; expected one of {', '.join(PATHS)}, or none")
    return chunked if name == "chunked" else whole


def _suiting(setting: Setting, inputs: LayerTensors) -> str:
    if setting.device.type == "cpu":
        return "chunked"
    if not suits(setting, inputs):
        return "whole"
    return "kernels" if are_proved(setting, inputs) else "whole"


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Compute by one path, whatever suits, until the end of the block (tests and benchmarks)."""
    assert name in PATHS, name
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
