"""How many processors this process may use, and that torch starts no more threads than that."""

import ctypes
import math
import os
from collections.abc import Callable
from functools import cache
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
    on, quota = len(allowed_processors()), cpu_quota(root)
    return on if quota is None else max(1, min(on, math.ceil(quota)))


def allowed_processors() -> set[int]:
    """Return the processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def sharing_processors(processes: Processes) -> int:
    """Return how many processes of the run may run on this one's processors, itself included.

    A scheduler may have given each its own, or all of a computer the same. To be called by all processes together.
    """
    if processes.place.world == 1:
        return 1
    mine = (this_computer(), allowed_processors())
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


def single_threaded() -> None:
    """Have torch compute with one thread where it is called in this thread; others keep theirs.

    It begins a thread of a pool whose threads share the processors among themselves. Else each starts a team of as many
    as there are processors, which wait for each other's turn. Nothing happens where torch's libraries of threads are not
    found.
    """
    torch.get_num_threads()  # a thread's first call sets its numbers to the process's, so it comes first
    for set_number in _setters():
        set_number(1)


@cache
def _setters() -> tuple[Callable[[int], object], ...]:
    """What sets the number of threads of the thread that calls it, of OpenMP and of MKL as torch has them.

    `torch.set_num_threads` would set the number of threads that begin later, too.
    """
    libraries = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # It is loaded already; a name is looked for in the libraries that it was linked with, too.
            library = ctypes.CDLL(str(libraries / name))
        except OSError:
            continue
        found = [
            getattr(library, name, None) for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local")
        ]
        return tuple(setter for setter in found if setter is not None)
    return ()
