"""Waits for servers: how long, what is said meanwhile, and how they end.

A request runs on a thread of its own, which may be stuck in the system (a silent server, a name that no server resolves);
who asked waits beside it and can be called away at any moment.
"""

import contextlib
from collections.abc import Callable, Iterator

_asked: list[Callable[[], bool]] = []


@contextlib.contextmanager
def waits_end_when(asked: Callable[[], bool]) -> Iterator[None]:
    """While this is entered, end every wait for a server, in any thread, as soon as `asked` says so: WaitEnded is raised."""
    _asked.append(asked)
    try:
        yield
    finally:
        _asked.remove(asked)
