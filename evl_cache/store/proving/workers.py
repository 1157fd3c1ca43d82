"""Threads that do the same with each of many things, hold few of them at a time, and end at once."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_HAND = 4  # things a thread that are begun or wait: one that takes long keeps no thread idle


class Stopped(Exception):
    """The work is given up: nobody waits for its result."""


class Workers:
    """Threads for the time of a `with`. Where that ends by an error or Ctrl-C, so do they, at their next `check`.

    Attributes:
        in_hand: things that are begun at a time, or wait for a thread.
    """

    def __init__(self, threads: int) -> None:
        self.in_hand = _IN_HAND * threads
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield what `work` returns of each thing, in their order. Raises: what `work` raises."""
        waiting, begun = iter(items), deque[Future[Result]]()
        begun.extend(self._pool.submit(work, item) for item in islice(waiting, self.in_hand))
        while begun:
            result = begun.popleft().result()
            begun.extend(self._pool.submit(work, item) for item in islice(waiting, 1))
            yield result

    def check(self, _: object = None) -> None:
        """Let a thread end that is in the midst of its work. Raises: Stopped."""
        if self._stop.is_set():
            raise Stopped

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
