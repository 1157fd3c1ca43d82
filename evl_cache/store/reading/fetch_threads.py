"""Threads that fetch: a process ends without waiting for them, for a server may be silent for long."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from evl_cache.errors import CacheError


class FetchThreads:
    """A few threads, started as there is work for them. Those of `concurrent.futures` are waited for at a process's end.

    Args:
        most: how many work at once.
    """

    def __init__(self, most: int) -> None:
        self._most, self._running = most, 0
        self._waiting: deque[tuple[Future[None], Callable[[], object]]] = deque()
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], object]) -> Future[None]:
        """Have work done; the future is done, or has what it raised, after it. Where no thread can be had, that is CacheError."""
        future: Future[None] = Future()
        with self._lock:
            self._waiting.append((future, work))
            is_new = self._running < self._most
            self._running += is_new
        if is_new:
            try:
                threading.Thread(target=self._run, name="fetch", daemon=True).start()
            except RuntimeError as error:
                self._go_on_without(error)
        return future

    def _go_on_without(self, error: RuntimeError) -> None:
        """Leave the work to other threads; where there are none, nobody will ever do it."""
        with self._lock:
            self._running -= 1
            while self._waiting and not self._running:
                reason = f"no thread to fetch with ({error}); raise the limit of processes (ulimit -u)"
                self._waiting.popleft()[0].set_exception(CacheError(reason))

    def drop_waiting(self) -> None:
        """Forget the work that was not begun, for which nobody waits any more."""
        with self._lock:
            self._waiting.clear()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, work = self._waiting.popleft()
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del future, work  # what they hold lives no longer than they are of use
