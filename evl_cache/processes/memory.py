"""How much memory is free, and how much was taken at most."""

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from evl_cache.processes.control_groups import ROOT, memory_left

MEMORY_SHARE = 0.7  # of the free memory, that training steps may take: others want some too
_CPU = torch.device("cpu")
ArgumentsT = ParamSpec("ArgumentsT")
ResultT = TypeVar("ResultT")
# What `ulimit -v` and `ulimit -d` bound, and the line of /proc/self/status that says how much of it is taken.
_RESOURCE_LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))


def available_bytes(device: torch.device, *, root: Path = ROOT) -> int:
    """The free bytes of a GPU, or of the computer, or of the job or container if its limit is nearer.

    Args:
        root: where /proc and the control groups are found.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    amounts = [_kilobytes(root / "proc/meminfo", "MemAvailable"), memory_left(root), *_within_ulimits(root)]
    known = [amount for amount in amounts if amount is not None]
    return min(known, default=4 << 30)  # if the system does not tell: any computer has that


def reset_peak(device: torch.device = _CPU) -> bool:
    """Begin to measure the peak anew. Returns: whether the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    give_back_memory()  # what is taken out of freed memory would not be seen
    try:
        (ROOT / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_memory(device: torch.device = _CPU) -> None:
    """Free what is held by cycles of objects alone, and return freed memory, of a GPU too, to the system, where it can.

    What a training leaves behind is large, few objects: Python would look for them only after many more, and the C library
    keeps what was freed for the next one, of which a run of another shape makes no use.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def giving_back_memory(function: Callable[ArgumentsT, ResultT]) -> Callable[ArgumentsT, ResultT]:
    """Return a function that gives memory back when it is left, with what it held."""

    @wraps(function)
    def given_back(*args: ArgumentsT.args, **more: ArgumentsT.kwargs) -> ResultT:
        try:
            return function(*args, **more)
        finally:
            give_back_memory()

    return given_back


def peak_bytes(device: torch.device = _CPU) -> int:
    """The most memory that this process has taken since it began, or since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (most := _kilobytes(ROOT / "proc/self/status", "VmHWM")) is not None:
        return most
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _within_ulimits(root: Path) -> list[int]:
    """Return the bytes that each limit of the user's shell leaves, where there is one."""
    left = []
    for limit, taken in _RESOURCE_LIMITS:
        most, used = resource.getrlimit(limit)[0], _kilobytes(root / "proc/self/status", taken)
        if most != resource.RLIM_INFINITY and used is not None:
            left.append(max(0, most - used))
    return left


def _kilobytes(path: Path, name: str) -> int | None:
    """Return the bytes of a line such as `MemAvailable:  12 kB`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
