"""The threads that read and decode batches: how many they are, and how they end."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import ParamSpec, Self

import torch

from evl_cache.processes import usable_cpus

FEWEST_READ_THREADS = 2
MOST_READ_THREADS = (
    32  # more would wait for Python's one lock, and have the thread that drives the device wait
)

# Of a server that answers, what was begun has come by then; of one that is silent it is not waited for.
_GRACE_S = 0.5
_AGAIN_S = 0.05

P = ParamSpec("P")


class ReadingThreads:
    """Threads that read while this is entered. It is left when none of them reads any more, which is soon.

    Args:
        count: of threads.
        end_waits: calls away those that wait for a server.
    """

    def __init__(self, count: int, *, end_waits: Callable[[], None]) -> None:
        self._end_waits = end_waits
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="read")
        self._given: set[Future[None]] = set()  # and not done

    def submit(self, read: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> "Future[None]":
        """Have something read. Returns: what tells when it is."""
        future = self._pool.submit(read, *args, **kwargs)
        self._given.add(future)
        future.add_done_callback(self._given.discard)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for future in list(self._given):
            future.cancel()
        reading = wait(list(self._given), timeout=_GRACE_S).not_done
        if kind not in (None, GeneratorExit):  # nobody goes on: what is fetched ahead is not wanted either
            self._end_waits()
        # Again and again: a thread that was called away from one piece may have begun to wait for the next.
        while reading:
            self._end_waits()
            reading = wait(reading, timeout=_AGAIN_S).not_done
        self._pool.shutdown()


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
