"""A device's two streams without a device: their work is done late, in whatever order the marks allow."""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class FakeMark:
    streams: "FakeStreams"
    is_passed: bool = False

    def query(self) -> bool:
        self.streams.run_some()
        return self.is_passed or self.streams.marks_lie

    def synchronize(self) -> None:
        if not self.streams.marks_lie:
            self.streams.run_until(self)


@dataclass
class FakeStreams:
    """Streams of the seam `batches.streams.Streams`.

    Attributes:
        lazy: `copies` or `computes`: that stream does nothing until something waits for it; None: both do some of
            their work now and then.
        copy_waits, use_waits: whether the waits of a stream are heeded; a test that never fails without them is none.
        host_computes: batches are used at once, by a processor that waits for their copies.
        marks_lie: they say that they are passed at once.
        given, done: how much work each stream was given, and has done.
    """

    lazy: str | None = None
    seed: int = 0
    copy_waits: bool = True
    use_waits: bool = True
    host_computes: bool = False
    marks_lie: bool = False
    given: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._queues: dict[str, deque[Callable[[], None] | FakeMark]] = {
            "copies": deque(),
            "computes": deque(),
        }

    def copy(self, work: Callable[[], None]) -> FakeMark:
        self._queues["copies"].append(work)
        self.given["copies"] += 1
        return self._mark("copies")

    def use(self, work: Callable[[], None]) -> None:
        """Compute, as whoever gets a batch does."""
        self._queues["computes"].append(work)
        self.given["computes"] += 1

    def copy_after(self, mark: FakeMark) -> None:
        if self.copy_waits:
            self._queues["copies"].append(_Wait(mark))

    def use_after(self, mark: FakeMark) -> None:
        if self.host_computes:
            mark.synchronize()
        elif self.use_waits:
            self._queues["computes"].append(_Wait(mark))

    def mark_use(self) -> FakeMark:
        return FakeMark(self, is_passed=True) if self.host_computes else self._mark("computes")

    @property
    def pending(self) -> dict[str, int]:
        """Items that are not done, by stream."""
        return {name: len(queue) for name, queue in self._queues.items()}

    def run_some(self) -> None:
        """Let the streams that are not lazy do some of their work."""
        for _ in range(self._random.randrange(6)):
            self._step([name for name in self._queues if name != self.lazy])

    def run_until(self, mark: FakeMark) -> None:
        """Do what a mark waits for, in an order drawn anew."""
        while not mark.is_passed:
            assert self._step(list(self._queues)), "streams wait for each other"

    def run_all(self) -> None:
        while any(self.pending.values()):
            assert self._step(list(self._queues)), "streams wait for each other"

    def _mark(self, name: str) -> FakeMark:
        mark = FakeMark(self)
        self._queues[name].append(mark)
        return mark

    def _step(self, names: list[str]) -> bool:
        """Do the next item of a stream that can go on. Returns: whether one can."""
        ready = [name for name in names if self._queues[name] and not _is_blocked(self._queues[name][0])]
        if not ready:
            return False
        # The lazy one only where the others cannot go on.
        name = self._random.choice([name for name in ready if name != self.lazy] or ready)
        item = self._queues[name].popleft()
        if isinstance(item, FakeMark):
            item.is_passed = True
        elif not isinstance(item, _Wait):
            item()
            self.done[name] += 1
        return True


@dataclass(frozen=True)
class _Wait:
    mark: FakeMark

    def __call__(self) -> None:
        raise AssertionError("a wait is no work")


def _is_blocked(item: object) -> bool:
    return isinstance(item, _Wait) and not item.mark.is_passed
