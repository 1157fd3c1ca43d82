"""What a benchmark ran on, and how much memory it took: printed beside every ratio."""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """Processor, cores that may be used, torch and its threads."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.split(":", 1)[1].strip() for line in cpuinfo.open() if line.startswith("model name"))
        name = next(lines, name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def peak_memory_bytes() -> int:
    """The largest resident memory this process has had so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss where this exists: a child begins with its parent's.
        line = next(line for line in status.open() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def interleaved_seconds(
    sides: Mapping[str, Callable[[], object]], rounds: int, *, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every call, A B A B, after one call of each that is not counted; `before` each, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, call in sides.items():
            before()
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}
