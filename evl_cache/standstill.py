"""Time in which this process stood still, and which no wait may hold against what it waits for.

Ctrl-Z, a debugger and a scheduler that suspends jobs stop a process for minutes or hours; the clock goes on. A server or a
decoder that is stopped or left alone for so long is neither silent nor slow.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_LEAST_S = 1.0  # a step that takes so much longer than it was to


class Standstill:
    """Looks at the clock after each step of a wait."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, at: float | None = None) -> None:
        """Begin a step, now or at a time of the monotonic clock."""
        self._looked = time.monotonic() if at is None else at
        self._worked = time.process_time()

    def look(self, step_s: float) -> float:
        """Return the seconds for which this process stood still during a step, and begin the next one.

        A step that is late because this process computed (another of its threads held the interpreter) is none.

        Args:
            step_s: how long the step was to take at most; short, since what was computed meanwhile is taken off.
        """
        now, worked = time.monotonic(), time.process_time()
        late_s = now - self._looked - step_s - (worked - self._worked)
        self._looked, self._worked = now, worked
        return late_s if late_s >= _LEAST_S else 0.0


class TimeLimit:
    """A limit for something that is waited for in steps.

    Attributes:
        seconds: the limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._standstill = Standstill()

    @property
    def left_s(self) -> float:
        """The seconds that are left; none where it is not above zero."""
        return self._until - time.monotonic()

    def look(self, step_s: float) -> None:
        """Note that a step has ended, which was to take so many seconds at most."""
        self._until += self._standstill.look(step_s)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """While this is entered, the time does not run."""
        self.look(0.0)
        began = time.monotonic()
        try:
            yield
        finally:
            self._until += time.monotonic() - began
            self._standstill.begin()
