"""Threads that do the same with each of many things, hold few of them at a time, and end at once."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

from evl_cache.errors import CacheError
from evl_cache.store.objects.objects import Objects

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_HAND = 4  # things a thread that are begun or wait: one that takes long keeps no thread idle
_LOOK_EVERY_S = 0.1
_END_AGAIN_S = 0.05  # a thread may begin to wait just after the waits were ended


class Stopped(Exception):
    """The work is given up: nobody waits for its result."""


class Workers:
    """Threads for the time of a `with`. Where that ends by an error or Ctrl-C, so do they: what waits for a server ends
    at once, other work at its next `check`. The first error of any thread is one of the `with`.

    Args:
        threads: things done at a time.
        servers: files of which threads read or write; their waits end with the work.
        name: of the threads.

    Attributes:
        in_hand: things that are begun at a time, or wait for a thread.
    """

    def __init__(self, threads: int, *servers: Objects, name: str = "verify") -> None:
        self.in_hand = _IN_HAND * threads
        self._servers = servers
        self._stop = threading.Event()
        self._failure: Future[None] = Future()
        self._failing = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield what `work` returns of each thing, in their order.

        Raises: what `work` raises of any thing, as soon as it does: of several errors the first in time; CacheError where
            the system gives no thread.
        """
        waiting, begun = iter(items), deque[Future[Result]]()

        def begin(count: int) -> None:
            try:
                begun.extend(self._pool.submit(self._do, work, item) for item in islice(waiting, count))
            except RuntimeError as error:
                raise CacheError(
                    f"no thread to work with ({error}); use fewer, or raise the limit of processes (ulimit -u)"
                ) from error

        begin(self.in_hand)
        while begun:
            future = begun.popleft()
            either: tuple[Future[Any], ...] = (future, self._failure)
            while not wait(either, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED).done:
                pass  # a signal that comes just before a wait is handled at its end only
            if self._failure.done():
                self._failure.result()
            result = future.result()
            begin(1)
            yield result

    def check(self, _: object = None) -> None:
        """Let a thread end that is in the midst of its work. Raises: Stopped."""
        if self._stop.is_set():
            raise Stopped

    def _do(self, work: Callable[[Item], Result], item: Item) -> Result:
        self.check()
        try:
            return work(item)
        except BaseException as error:
            with self._failing:
                if not self._failure.done():  # what others raise then is that they were ended
                    self._failure.set_exception(error)
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        ended = threading.Event()
        if kind is not None and self._servers:
            try:
                threading.Thread(target=self._end_waits, args=(ended,), daemon=True).start()
            except RuntimeError:  # no thread: what waits now ends all the same
                for server in self._servers:
                    server.end_waits()
        try:
            self._pool.shutdown(wait=True, cancel_futures=True)
        finally:
            ended.set()

    def _end_waits(self, ended: threading.Event) -> None:
        while True:
            for server in self._servers:
                server.end_waits()
            if ended.wait(_END_AGAIN_S):
                return
