"""Clocks that tests move, so that nothing waits and nothing depends on how busy the machine is."""

from collections.abc import Callable

from evl_cache.store import Runtime


class Clock(Runtime):
    """A clock that only sleeping, or a test, moves; `at_look` is done each time somebody has waited."""

    def __init__(self, at_look: Callable[[], None] = lambda: None) -> None:
        self.now, self.at_look = 0.0, at_look

    def now_s(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1000
        self.at_look()
