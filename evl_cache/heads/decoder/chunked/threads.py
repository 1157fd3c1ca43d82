"""Work on slices of clips at once, one thread for each, instead of many threads for every operation.

A step is thousands of operations of a tenth of a millisecond. If each is spread over all cores, all cores wait for the
slowest one thousands of times. On a machine that does anything else, a step then takes ten times as long.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from evl_cache.heads.decoder.chunked.chunks import CPU_SLICES_AT_ONCE

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_lock = threading.Lock()
_users = 0
_threads_before = 1


def map_in_threads(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], device: torch.device
) -> list[ResultT]:
    """Return `function` of every item, in their order, with autograd and autocast off; on a CPU one thread an item.

    torch's number of threads is divided among the items. With a single item, or on another device, it stays as it is.
    """
    workers = min(torch.get_num_threads(), len(items), CPU_SLICES_AT_ONCE)

    def plainly(item: ItemT) -> ResultT:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # both are set for each thread
            return function(item)

    if device.type != "cpu" or workers < 2:
        return [plainly(item) for item in items]
    with (
        _threads_an_operation(torch.get_num_threads() // workers),
        ThreadPoolExecutor(workers, "evl-cache-head") as pool,
    ):
        return list(pool.map(plainly, items))


@contextmanager
def _threads_an_operation(number: int) -> Iterator[None]:
    """Spread operations of threads that start meanwhile over so many cores each.

    torch has one such number for all new threads, so callers in several threads share the number to restore. A thread
    of other code keeps this number if it runs its first operation meanwhile: torch reads it only then.
    """
    global _users, _threads_before
    with _lock:
        _threads_before = _threads_before if _users else torch.get_num_threads()
        _users += 1
        torch.set_num_threads(number)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(_threads_before)
