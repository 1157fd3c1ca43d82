"""Time in which this process stood still is counted against nobody; time in which it ran is."""

import pytest

from evl_cache import standstill
from evl_cache.standstill import Standstill, TimeLimit


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = self.worked = 100.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.worked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(standstill, "time", clock)
    return clock


def test_a_step_that_took_much_longer_than_it_was_to_is_a_standstill(clock: Clock) -> None:
    steps = Standstill()
    clock.now += 0.1
    assert steps.look(0.1) == 0
    clock.now += 1.0
    assert steps.look(0.1) == 0  # a loaded machine
    clock.now += 60.1
    assert steps.look(0.1) == pytest.approx(60)
    clock.now += 0.1
    assert steps.look(0.1) == 0
    clock.now, clock.worked = clock.now + 60, clock.worked + 59.5
    assert steps.look(0.1) == 0  # another thread computed, and held the interpreter
    steps.begin(clock.now - 5)
    assert steps.look(1.0) == pytest.approx(4)


def test_a_limit_runs_while_this_process_does(clock: Clock) -> None:
    limit = TimeLimit(10)
    for _ in range(4):
        clock.now += 1.0
        limit.look(1.0)
    assert limit.left_s == pytest.approx(6)
    clock.now += 3601
    limit.look(1.0)
    assert limit.left_s == pytest.approx(5)
    clock.now += 3600  # while frames were copied
    with limit.suspended():
        clock.now += 50
    limit.look(1.0)
    assert limit.left_s == pytest.approx(5), "what was suspended is no standstill besides"
    clock.now += 1.5
    limit.look(1.0)
    clock.now += 4
    assert limit.left_s < 0
