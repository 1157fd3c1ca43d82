"""How many threads read and decode batches."""

import torch

from evl_cache.processes import usable_cpus

FEWEST_READ_THREADS = 2
MOST_READ_THREADS = (
    32  # more would wait for Python's one lock, and have the thread that drives the device wait
)


def read_threads(given: int | None, device: str | torch.device, *, sharing: int = 1) -> int:
    """Return how many threads read: as many as given, or by default what suits the device.

    Beside a GPU all processors but one read. Beside training on a CPU two threads do, and leave the processors to torch.

    Args:
        sharing: processes that share the processors.
    """
    if given is not None:
        return given
    if torch.device(device).type == "cpu":
        return FEWEST_READ_THREADS
    return min(MOST_READ_THREADS, max(FEWEST_READ_THREADS, usable_cpus() // sharing - 1))
