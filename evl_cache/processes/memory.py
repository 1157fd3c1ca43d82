"""How much memory is free, and how much was taken at most."""

import resource
import sys
from pathlib import Path

import torch

MEMORY_SHARE = 0.7  # of the free memory, that training steps may take: others want some too
_CPU = torch.device("cpu")
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """The free bytes of a GPU, or of the computer, or of the container if its limit is nearer."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    amounts = [_meminfo("MemAvailable"), _container_bytes()]
    known = [amount for amount in amounts if amount is not None]
    return min(known, default=4 << 30)  # if the system does not tell: any computer has that


def reset_peak(device: torch.device = _CPU) -> bool:
    """Begin to measure the peak anew. Returns: whether the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROC / "self" / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device = _CPU) -> int:
    """The most memory that this process has taken since it began, or since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = (_PROC / "self" / "status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _meminfo(name: str) -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _container_bytes() -> int | None:
    """The memory that control groups version 2 leave this process, or None where they set no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("file", 0)))
