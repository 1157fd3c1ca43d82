"""Triton kernels as they are launched, compiled for a card that need not be there."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launches:
    """Stands in for a kernel: remembers what it is launched with, and runs nothing.

    With tensors on torch's device `meta`, launches of any size are had without their memory.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grid: tuple[int, ...] = ()
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        self.grid = grid
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs

    def compiled(self, capability: int) -> Any:
        """Return the last launch's kernel for a compute capability, as 90: its `asm` by name, its `metadata`."""
        constants = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        signature, constexprs, attributes = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if name in constants or value is None:
                signature[name], constexprs[(i,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], attributes[(i,)] = _TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = triton.compiler.ASTSource(self.kernel, signature, constexprs, attributes)
        options = {name: self.arguments[name] for name in _OPTIONS if name in self.arguments}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
