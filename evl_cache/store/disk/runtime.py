"""The clock and the threads of a block taker, in one place, so that a simulation can put its own there."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

from evl_cache.errors import CacheError


class Runtime:
    """The real clock and the real threads."""

    def now_s(self) -> float:
        """Return the seconds of a clock that only this process reads."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        time.sleep(seconds)

    def repeat(self, action: Callable[[], None], *, every_s: float, name: str) -> Callable[[], None]:
        """Do something again and again, in a thread of its own, and return what stops it and waits for its end.

        Raises: CacheError where the system gives no thread.
        """
        stopped = threading.Event()

        def loop() -> None:
            while not stopped.wait(every_s):
                action()

        thread = threading.Thread(target=loop, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise CacheError(
                f"no thread to work with ({error}); use fewer, or raise the limit of processes (ulimit -u)"
            ) from error

        def stop() -> None:
            stopped.set()
            thread.join()

        return stop

    def executor(self, name: str, *, threads: int = 1) -> Executor:
        """Return what runs tasks in the background, one after another, or as many at once as there are threads."""
        return ThreadPoolExecutor(threads, thread_name_prefix=name)


REAL = Runtime()
