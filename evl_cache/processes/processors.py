"""How many processors this process may use, and that torch starts no more threads than that."""

import math
import os
from pathlib import Path

import torch

from evl_cache.processes.control_groups import ROOT, cpu_quota
from evl_cache.processes.group import Processes
from evl_cache.processes.place import this_computer


def usable_cpus(root: Path = ROOT) -> int:
    """Return the number of processors: those that this process may run on, or fewer by a quota; at least 1.

    Args:
        root: where /proc and the control groups are found.
    """
    on, quota = len(_processors()), cpu_quota(root)
    return on if quota is None else max(1, min(on, math.ceil(quota)))


def _processors() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def sharing_processors(processes: Processes) -> int:
    """Return how many processes of the run may run on this one's processors, itself included.

    A scheduler may have given each its own, or all of a computer the same. To be called by all processes together.
    """
    if processes.place.world == 1:
        return 1
    mine = (this_computer(), _processors())
    found = processes.gather(mine, "while sharing processors")
    return sum(computer == mine[0] and bool(on & mine[1]) for computer, on in found)


def limit_torch_threads(root: Path = ROOT) -> None:
    """Have torch start no more threads than there are processors, unless OMP_NUM_THREADS or the like is set.

    torch minds which processors it may run on, not a quota of their time: in a job with 2 of 64 it starts 64 threads,
    which wait for each other's turn.
    """
    is_told = any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if not is_told and torch.get_num_threads() > (number := usable_cpus(root)):
        torch.set_num_threads(number)
