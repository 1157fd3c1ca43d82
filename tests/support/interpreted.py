"""Triton kernels run by Triton's interpreter on a CPU, in a process of its own.

The interpreter is chosen by an environment variable that triton reads as it is loaded, and torch may have loaded triton
in this process long before. So one process is started with it, and asked by pipe; it ends with this one.

Its bfloat16 is not a device's: it rounds towards zero, and multiplies bit patterns. Both are mended here, so that
a kernel's casts round to the nearest and its products are sums of products.
"""

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "evl_cache.heads.decoder.kernels"


def interpreted(place: str, *args: Any, **kwargs: Any) -> Any:
    """Return what a function of the kernels' package returns on CPU tensors.

    Args:
        place: module and function, as `attention.attend`.
        args: of the function, pickled, as are `kwargs` and the result.

    Raises: AssertionError with the other process's traceback where the function raises.
    """
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    pickle.dump((place, args, kwargs), process.stdin)
    process.stdin.flush()
    error, result = pickle.load(process.stdout)
    assert not error, error
    return result


@cache
def _process() -> subprocess.Popen[bytes]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env=environment)

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)

    atexit.register(end)
    return process


def _mend_bfloat16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(values: Any) -> Any:
        return (values.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return cast(self, source, kind)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(widened(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes elsewhere
    _mend_bfloat16()
    while True:
        try:
            place, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        module, _, name = place.rpartition(".")
        try:
            answer = "", getattr(importlib.import_module(f"{KERNELS}.{module}"), name)(*args, **kwargs)
        except Exception:
            answer = traceback.format_exc(), None
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
