"""When to ask the kernel for chunks ahead: on a cold disk always, on a warm one never."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

_SAMPLES = 256  # read with read-ahead after a look at the disk; then some go without, to look again


class ReadAhead:
    """A watch over a mapped file's page faults: one that went to the disk says that the cache is cold.

    Asking for pages that are there already costs a tenth of copying them; not asking for those that are not
    costs half the speed of a plain sequential read. Threads may share one: it only counts.

    Args:
        always: for files that are not mapped, whose reads say nothing.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._left = _SAMPLES

    def is_on(self) -> bool:
        """Whether to ask for what will be needed."""
        return self._always or self._left > 0

    @contextmanager
    def watching(self, samples: int) -> Iterator[None]:
        """Count the page faults of reading some samples, which is done inside."""
        if self._left > 0 or self._always:
            self._left -= samples
            yield
            return
        before = _disk_faults()
        yield
        if _disk_faults() != before:
            self._left = _SAMPLES


def _disk_faults() -> int:
    """Count this thread's page faults that went to the disk (the process's, where threads are not told apart)."""
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_majflt
