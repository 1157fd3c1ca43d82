"""A CUDA device that only knows shapes, dtypes and devices: code for a GPU is tried on a machine without one.

In `fake_cuda()` tensors on `cuda` are fake. A tensor of the wrong device or dtype in the middle of a step is an error there
as on a card, and so is what makes a processor wait for the device (`.item()`, `float(loss)`, indexing by a mask).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Watched(TorchDispatchMode):
    """Notes what is dispatched: how many operations, those that make float64, and copies from the device to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.float64: list[str] = []
        self.to_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        given = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        made = [o for o in torch.utils._pytree.tree_leaves(out) if isinstance(o, Tensor)]
        if any(o.dtype == torch.float64 and o.ndim for o in made):
            self.float64.append(str(func))
        if any(a.is_cuda for a in given) and any(o.device.type == "cpu" for o in made):
            self.to_host.append(str(func))
        return out


@contextmanager
def fake_cuda() -> Iterator[Watched]:
    """Have `cuda` be there, faked, with bfloat16; `Tensor.backward` walks the graph itself. Gives what was dispatched."""
    with ExitStack() as stack:
        for name, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.empty_cache": lambda: None,
        }.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(Tensor, "backward", lambda loss, *_, **__: backward(loss)))
        stack.enter_context(walkable())
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(Watched())


@contextmanager
def walkable() -> Iterator[None]:
    """Have each Python function's node know which of its arguments were tensors: `backward` must, and torch tells nobody."""

    def noting(function: Any, *arguments: Any) -> Any:
        out = super(torch.autograd.Function, function).apply(*arguments)
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor) and each.grad_fn is not None:
                each.grad_fn.are_tensors = [isinstance(argument, Tensor) for argument in arguments]
        return out

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(noting), create=True):
        yield


def on_cuda(module: ModuleT) -> ModuleT:
    """Put a module that was built on the meta device onto the fake one, within `fake_cuda()`."""

    def there(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = there(parameter)
                part._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = there(buffer)
    return module


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """Compute gradients node by node, as autograd's engine does, which asks for a real CUDA context on such tensors."""
    root = loss.grad_fn
    assert root is not None, "nothing that needs a gradient led to this loss"
    users = _users(root)
    given: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    while ready:
        node = ready.pop()
        found = given.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, found.get(0))
            continue
        gradients = _gradients(node, found)
        for (following, number), gradient in zip(node.next_functions, gradients, strict=False):
            if following is None:
                continue
            if gradient is not None:
                wanted = following._input_metadata[number]
                assert gradient.device == wanted.device, (
                    f"{node.name()}: {gradient.device}, not {wanted.device}"
                )
                fitting = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                before = given.setdefault(following, {})
                before[number] = before[number] + fitting if number in before else fitting
            users[following] -= 1
            if not users[following]:
                ready.append(following)


def _users(root: Any) -> dict[Any, int]:
    """How many nodes each node gets gradients from."""
    users: dict[Any, int] = {}
    seen, waiting = {root}, [root]
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is not None:
                users[following] = users.get(following, 0) + 1
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return users


def _gradients(node: Any, found: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    if not found:
        return tuple(None for _ in node.next_functions)
    arguments = [found.get(number) for number in range(len(node._input_metadata))]
    if callable(node):
        gradients = node(*arguments)
        return gradients if isinstance(gradients, tuple) else (gradients,)
    # A Python function's node, which has a following node for each argument that is a tensor.
    gradients = node.apply(*arguments)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return tuple(g for g, is_tensor in zip(gradients, node.are_tensors, strict=True) if is_tensor)


def _accumulate(variable: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        assert gradient.shape == variable.shape and gradient.dtype == variable.dtype
        variable.grad = gradient if variable.grad is None else variable.grad + gradient
