"""How many processors this process may use, and that torch starts no more threads than that."""

import math
import os
from pathlib import Path

import torch

from evl_cache.processes.control_groups import ROOT, cpu_quota


def usable_cpus(root: Path = ROOT) -> int:
    """Return the number of processors: those that this process may run on, or fewer by a quota; at least 1.

    Args:
        root: where /proc and the control groups are found.
    """
    on = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return on if quota is None else max(1, min(on, math.ceil(quota)))


def limit_torch_threads(root: Path = ROOT) -> None:
    """Have torch start no more threads than there are processors, unless OMP_NUM_THREADS or the like is set.

    torch minds which processors it may run on, not a quota of their time: in a job with 2 of 64 it starts 64 threads,
    which wait for each other's turn.
    """
    is_told = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if not is_told and torch.get_num_threads() > (number := usable_cpus(root)):
        torch.set_num_threads(number)
