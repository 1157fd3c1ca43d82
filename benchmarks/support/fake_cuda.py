"""CUDA tensors without a GPU: shapes, dtypes and devices are followed, and nothing is computed."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# They make a tensor, or look at one otherwise, and start nothing on the device.
_NO_LAUNCH = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
)


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device's kernels.

    Attributes:
        launches: operations that compute, fill or copy; a launch each at the least.
        operations: those, and views and allocations, which cost time of the processor alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and name != "promote_types":  # questions about a tensor
            self.operations += 1
            self.launches += not (func.is_view or name in _NO_LAUNCH)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Make tensors of the yielded device fake ones until the end of the block; autocast works for them."""
    with ExitStack() as stack:
        for name, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", False),
            ("torch.cuda.is_bf16_supported", True),
            ("torch.nn.init._no_grad_trunc_normal_", None),  # it looks at values, and there are none
        ):
            stack.enter_context(mock.patch(name, return_value=value))
        stack.enter_context(FakeTensorMode())
        yield torch.device("cuda", 0)


def backward(loss: torch.Tensor) -> None:
    """Compute the gradients of all leaves, as `loss.backward()` does.

    By walking the graph here: torch's engine asks the driver for the device's streams, and there is no driver.
    """
    gradients: dict[Any, list[torch.Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    for node in _from_loss_to_leaves(loss.grad_fn):
        if node.name() == "torch::autograd::AccumulateGrad":
            (node.variable.grad,) = gradients.pop(node)
            continue
        for (child, place), gradient in _gradients(node, gradients.pop(node)):
            wanted = child._input_metadata  # of the gradients that it takes
            assert gradient.device == wanted[place].device, f"{node.name()} gives one of {gradient.device}"
            if gradient.shape != wanted[place].shape:  # that of what was broadcast
                gradient = gradient.sum_to_size(wanted[place].shape)
            into = gradients.setdefault(child, [None] * len(wanted))
            before, gradient = into[place], gradient.to(wanted[place].dtype)
            into[place] = gradient if before is None else before + gradient


@torch.no_grad()
def _gradients(node: Any, given: list[torch.Tensor | None]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield where a node's gradients go, and each."""
    edges = node.next_functions
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # it has edges for tensors alone
        found = list(itertools.compress(node.apply(*given), node.needs_input_grad))
        edges = [edge for edge in edges if edge[0] is not None]
    else:
        found = node(*given)
        found = found if isinstance(found, tuple) else (found,)
    for edge, gradient in zip(edges, found, strict=True) if edges else ():
        if edge[0] is not None and gradient is not None:
            yield edge, gradient


def _from_loss_to_leaves(root: Any) -> list[Any]:
    """The nodes of a graph, each after all that lead to it."""
    order, seen = [], set()
    stack = [(root, False)]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return order[::-1]
