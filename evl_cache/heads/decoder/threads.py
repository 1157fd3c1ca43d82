"""Blocks of clips worked on at once, one thread each, instead of many threads to every operation.

A step is thousands of operations of a tenth of a millisecond. If each is spread over all cores, all wait for the
slowest thousands of times, and on a machine that does anything else a step takes ten times as long.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from evl_cache.heads.decoder.chunks import CPU_BLOCKS_AT_ONCE

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_lock = threading.Lock()
_users = 0
_threads_before = 1


def map_in_threads(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], device: torch.device
) -> list[ResultT]:
    """`function` of every item, in their order, with autograd and autocast off; on a CPU one thread an item.

    torch's number of threads is shared out among items: each operation is spread over what an item gets. With a
    single item, or on another device, nothing is changed.
    """
    workers = min(torch.get_num_threads(), len(items), CPU_BLOCKS_AT_ONCE)

    def plainly(item: ItemT) -> ResultT:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # both are of each thread
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
    """While this is entered, operations of threads that begin now are spread over so many cores.

    torch has one such number for all threads to come, so callers in several threads share what it was before. A
    thread of someone else's whose first operation falls in between keeps this one: torch asks only then.
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
