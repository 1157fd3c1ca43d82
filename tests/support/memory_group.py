"""A control group of the kernel with a limit of memory, for processes of a test: only root can make one."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evl_cache.processes.control_groups import _groups

_INTERVAL_S = 0.005
# Memory of processes, and what they share; what the kernel keeps of files, and gives back, is not counted.
_TAKEN = {1: ("total_rss", "total_shmem"), 2: ("anon", "shmem")}
_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}


class MemoryGroup:
    """A group with a limit.

    Attributes:
        path: its directory; a process is in it whose number is written to `cgroup.procs`.
        peak: the most bytes that were seen to be taken.
    """

    def __init__(self, path: Path, version: int) -> None:
        self.path, self._version, self.peak = path, version, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            with suppress(OSError):
                lines = (self.path / "memory.stat").read_text().splitlines()
                stat = dict(line.split(" ") for line in lines)
                self.peak = max(self.peak, sum(int(stat.get(name, 0)) for name in _TAKEN[self._version]))


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup | None]:
    """Make a group below this process's own, whose processes get no more than `limit` bytes. Yields: None where it cannot."""
    made = _made(limit)
    if made is None:
        yield None
        return
    group = MemoryGroup(*made)
    try:
        yield group
    finally:
        group.stop()
        for _ in range(100):  # until the kernel has seen its processes end
            with suppress(OSError):
                made[0].rmdir()
                break
            time.sleep(0.05)


def _made(limit: int) -> tuple[Path, int] | None:
    for version, own in _groups("memory", Path("/")):
        path = own / f"evl-cache-test-{os.getpid()}-{time.monotonic_ns()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            (path / _LIMIT[version]).write_text(str(limit))
            for name in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
                with suppress(OSError):  # where swap is not counted
                    (path / name).write_text(str(limit if version == 1 else 0))
        except OSError:
            path.rmdir()
            continue
        return path, version
    return None
