"""The body of an answer, read into memory as it comes."""

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from evl_cache.store.objects.waits import Attempt

_FIRST_STEP_NBYTES, _MOST_STEP_NBYTES = 1 << 14, 1 << 18
_FAST_S = 0.1


class Body(Protocol):
    """What a body is read from: a response of urllib3, with its content as it was sent."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill a buffer, or what of it there is. Returns: bytes; 0 at the end."""

    def shutdown(self) -> None:
        """End a read that another thread waits in."""


def read_known(body: Body, nbytes: int, attempt: Attempt) -> memoryview:
    """Return so many bytes; fewer where the body ends before."""
    attempt.reads(body.shutdown)
    out, filled, step = memoryview(bytearray(nbytes)), 0, _Step()
    while filled < nbytes:
        with step.timed():
            count = body.readinto(out[filled : filled + step.nbytes])
        if not count:
            break
        filled += count
        attempt.came(count)
    return out[:filled]


def read_most(body: Body, most_nbytes: int, attempt: Attempt) -> bytes | None:
    """Return a whole body whose size is not known; None where it has more bytes than `most_nbytes`."""
    attempt.reads(body.shutdown)
    out, buffer, step = bytearray(), memoryview(bytearray(_MOST_STEP_NBYTES)), _Step()
    while True:
        with step.timed():
            count = body.readinto(buffer[: step.nbytes])
        if not count:
            return bytes(out)
        out += buffer[:count]
        attempt.came(count)
        if len(out) > most_nbytes:
            return None


class _Step:
    """How much is read at a time: little over a slow line, so that it is seen to move."""

    def __init__(self) -> None:
        self.nbytes = _FIRST_STEP_NBYTES

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        if time.monotonic() - began < _FAST_S:
            self.nbytes = min(2 * self.nbytes, _MOST_STEP_NBYTES)
