"""Whether operations run at once on ordinary tensors, or something else looks at them: a compiler, a transform, a mode."""

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

_ORDINARY = frozenset({Tensor, torch.nn.Parameter})


def is_followed() -> bool:
    """Whether operations are followed one by one, and must be torch's own differentiable ones.

    `torch.compile`, `torch.export`, `torch.jit.trace`, transforms of `torch.func` and forward differentiation do so.
    """
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or torch._C._get_tracing_state() is not None  # of torch.jit.trace
    )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward differentiation is going on."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether a dispatch mode of this thread sees all operations, as `FakeTensorMode` or a counter of operations does."""
    before_autograd: int = _len_torch_dispatch_stack_pre_dispatch()  # type: ignore[no-untyped-call]  # as exporters do
    return torch._C._len_torch_dispatch_stack() > 0 or before_autograd > 0


def is_many(gradient: Tensor) -> bool:
    """Whether a gradient stands for many at once, as where `torch.autograd.grad` is told `is_grads_batched`."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient)) or is_followed()


def are_ordinary(*tensors: Tensor | None) -> bool:
    """Whether tensors have memory and no class of their own, as fake and functional ones have."""
    return all(tensor is None or type(tensor) in _ORDINARY for tensor in tensors)
