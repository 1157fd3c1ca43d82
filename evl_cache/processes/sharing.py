"""Memory that processes of one computer share: what one of them writes there, the others read."""

import contextlib
import mmap
import os
from collections.abc import Sequence

import numpy as np

from evl_cache.processes.group import Processes
from evl_cache.processes.place import this_computer

_WHEN = "while sharing memory"


def sharing_groups(processes: Processes) -> tuple[int, ...]:
    """Return the group of each rank: the first rank of those that it can share memory with, itself included.

    To be called by all processes together.
    """
    found = processes.gather(this_computer(), _WHEN)
    return tuple(found.index(computer) for computer in found)


def shared_memory(processes: Processes, groups: Sequence[int], nbytes: int) -> np.ndarray | None:
    """Return zeros, uint8, that this process shares with its group; None in all processes where one cannot have them.

    It is memory without a file, so /dev/shm does not bound it, and it is gone when the last process is. Memory is taken
    as it is written. To be called by all processes together.

    Args:
        groups: of `sharing_groups`.
        nbytes: how many; the first process of a group says.
    """
    rank = processes.place.rank
    is_first = groups[rank] == rank
    with contextlib.ExitStack() as opened:
        found: int | None = None
        if is_first:
            with contextlib.suppress(OSError, AttributeError):  # this system has none
                found = os.memfd_create("evl-cache-samples")
                opened.callback(os.close, found)
                os.ftruncate(found, max(1, nbytes))
        told = processes.gather((os.getpid(), found, nbytes) if is_first else None, _WHEN)[groups[rank]]
        mapped: mmap.mmap | None = None
        with contextlib.suppress(OSError, ValueError):
            assert told is not None, "a group's first process tells"
            if told[1] is not None:
                # A file without a name is opened through the process that has it.
                file = os.open(f"/proc/{told[0]}/fd/{told[1]}", os.O_RDWR)
                opened.callback(os.close, file)
                mapped = mmap.mmap(file, max(1, told[2]))
        # The first process closes its own only when all others have opened it.
        are_mapped = processes.gather(mapped is not None, _WHEN)
    if mapped is None or not all(are_mapped):
        return None
    return np.frombuffer(mapped, np.uint8)
