"""How often, and after which waits, what arrives damaged from a server is asked for again."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from evl_cache.errors import CacheDamaged

Found = TypeVar("Found")

ATTEMPTS = 4
_BACKOFF_S = 0.1


def attempts() -> Iterator[int]:
    """Yield the number of each attempt; before each but the first, wait longer than before the last one."""
    for attempt in range(ATTEMPTS):
        time.sleep(_BACKOFF_S * (2**attempt - 1))
        yield attempt


def once_intact(read: Callable[[], Found]) -> Found:
    """Return what `read` returns, which is asked again where it raises CacheDamaged. Raises: what it raises the last time."""
    for attempt in attempts():
        try:
            return read()
        except CacheDamaged:
            if attempt + 1 == ATTEMPTS:
                raise
    raise AssertionError("unreachable")
