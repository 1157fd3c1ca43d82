"""A fake CUDA device that notes what a card would suffer from: float64, and copies from the device to the processor.

A tensor of another device in the middle of a step is an error there as on a card, and so is what makes the processor wait
for the device (`.item()`, `float(loss)`, indexing by a mask).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.support.fake_cuda import backward, fake_cuda


class Watched(TorchDispatchMode):
    """Notes what is dispatched.

    Attributes:
        operations: how many there were.
        float64: names of operations that made such tensors, numbers left out.
        to_host: names of operations that took a tensor of the device and made one of the processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.float64: list[str] = []
        self.to_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if any(each.dtype == torch.float64 and each.ndim for each in made):
            self.float64.append(str(func))
        was_there = any(isinstance(each, Tensor) and each.is_cuda for each in tree_leaves((args, kwargs)))
        if was_there and any(each.device.type == "cpu" for each in made):
            self.to_host.append(str(func))
        return out

    def check(self) -> None:
        """Fail where something was noted, or nothing was done."""
        assert self.operations and self.float64 == [] and self.to_host == []


@contextmanager
def watched_cuda() -> Iterator[Watched]:
    """Have new tensors be on the fake device, `Tensor.backward` work there, and modules stay where they are."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "backward", lambda loss, *_, **__: backward(loss)))
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        device = stack.enter_context(fake_cuda())
        stack.enter_context(device)
        yield stack.enter_context(Watched())
