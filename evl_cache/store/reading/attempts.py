"""How often, and after which waits, what arrives damaged from a server is asked for again."""

import time
from collections.abc import Iterator

ATTEMPTS = 4
_BACKOFF_S = 0.1


def attempts() -> Iterator[int]:
    """Yield the number of each attempt; before each but the first, wait longer than before the last one."""
    for attempt in range(ATTEMPTS):
        time.sleep(_BACKOFF_S * (2**attempt - 1))
        yield attempt
