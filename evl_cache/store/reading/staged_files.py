"""Files of a copy get their names whole, by any number of threads and processes at once.

Threads that fetch end with their process, wherever they are (see `fetch_threads`). So the process ends when what they write at
that moment has its name: else each would leave a file that nobody looks at again.
"""

import contextlib
import functools
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from evl_cache.errors import WaitEnded
from evl_cache.store.disk.forks import renew_in_children

STAGED = re.compile(r"\.tmp-[0-9]+-.+")  # also of older versions
_MOST_S = 2.0  # that the end of the process waits for a disk
_OLD_S = 24 * 3600.0  # of a process that was killed, then


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield where to write a file of a copy, which gets its name at the end; where writing fails, nothing stays.

    Raises: OSError; WaitEnded where the process is ending.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
    with _writes().one_more():
        try:
            yield temporary
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # it has its name, was never made, or the disk has gone
                temporary.unlink()


def remove_old_staged(directory: Path) -> None:
    """Remove what killed processes left on its way in a directory, a day later: no process writes one file for so long."""
    for name in filter(STAGED.fullmatch, os.listdir(directory)):
        with contextlib.suppress(OSError):  # another process removes it, too
            path = directory / name
            if time.time() - path.lstat().st_mtime > _OLD_S:
                path.unlink()


class _Writes:
    """How many files of this process are on their way."""

    def __init__(self) -> None:
        self.renew()
        renew_in_children(self)
        # Before `atexit`, when threads are no longer heard of.
        threading._register_atexit(self.end)  # type: ignore[attr-defined]

    def renew(self) -> None:
        """A forked child writes none yet."""
        self._changed, self._count, self._has_ended = threading.Condition(), 0, False

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """Keep the process from ending. Raises: WaitEnded where it is."""
        with self._changed:
            if self._has_ended and threading.current_thread() is not threading.main_thread():
                raise WaitEnded("a file of a copy is not written any more, as the process ends")
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Let no other thread begin, and wait for those that have begun."""
        with self._changed:
            self._has_ended = True
            self._changed.wait_for(lambda: not self._count, timeout=_MOST_S)


@functools.cache
def _writes() -> _Writes:
    return _Writes()
