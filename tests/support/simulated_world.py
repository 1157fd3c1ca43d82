"""A clock, processes and an operating system of our own, under which real code runs: one task at a time, by seed.

What is not real: time, threads (each is a greenlet, switched at calls of the operating system), and who dies. What is:
the code, and the directory it works in.
"""

import heapq
import itertools
import os
import random
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from greenlet import getcurrent, greenlet

from evl_cache.store.disk import locks as locks_module
from evl_cache.store.disk.runtime import Runtime
from evl_cache.store.format.index import Index
from evl_cache.store.format.index_file import IndexFile

EXPIRY_S = 20.0
MOST_STEPS = 15_000  # of one schedule: it hangs
_SWITCHED = "open write writev fsync link unlink rename replace mkdir pwrite stat listdir".split()
_LOOKS = ("stat", "listdir")


class Died(BaseException):
    """Unwinds what a dead process was doing; nothing it does on the way has an effect."""


class Failed(AssertionError):
    """A rule was broken."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to one process.

    Attributes:
        starts_s: when. host: processes of one host see each other die. kind: of processor; features differ by kind.
        dies_at: its so-many-th call of the operating system; None: never. after: behind that call, not before.
        loses_unsynced: the host goes down with it, and what was not synced with the host.
        pauses: (call, seconds) at which everything it does stands still. slowness: of its disk.
        numbers: of the rendezvous it asks.
    """

    starts_s: float = 0.0
    host: str = "host"
    kind: int = 0
    dies_at: int | None = None
    after: bool = False
    loses_unsynced: bool = False
    pauses: dict[int, float] = field(default_factory=dict)
    slowness: float = 1.0
    numbers: bool = False


class Process:
    """A living or dead process of the simulation."""

    def __init__(self, world: "World", plan: Plan, pid: int) -> None:
        self.world, self.plan, self.pid = world, plan, pid
        self.is_alive, self.calls, self.paused_until_s = True, 0, 0.0
        self.open: dict[int, int] = {}  # descriptor -> bytes of it that are synced
        self.written: set[int] = set()
        self.result: Any = None
        self.ended_s = 0.0
        self.extracted: list[int] = []

    @property
    def disturbances(self) -> int:
        """How often others may rightly have taken it for dead: its death, long pauses, a disk as slow as a pause."""
        long = sum(seconds > EXPIRY_S / 4 for seconds in self.plan.pauses.values())
        return (self.plan.dies_at is not None) + long + (self.plan.slowness > 50)


class World:
    """A clock, processes, and their tasks."""

    def __init__(self, rng: random.Random, root: Path) -> None:
        self.rng, self.root = rng, root
        self.now_s, self.steps = 0.0, 0
        self.indexes = WeakSet[IndexFile]()
        self.last_marked_s = 0.0
        self._queue: list[tuple[float, int, greenlet]] = []
        self._order = itertools.count()
        self.hub = getcurrent()
        self.owner: dict[greenlet, Process] = {}
        self.processes: list[Process] = []
        self.numbers = 0

    @property
    def current(self) -> Process | None:
        """Whose code is running; None outside of the simulation."""
        return self.owner.get(getcurrent())

    def spawn(self, process: Process, work: Callable[[], None], after_s: float = 0.0) -> greenlet:
        task = greenlet(work, parent=self.hub)
        self.owner[task] = process
        self.wake(task, self.now_s + after_s)
        return task

    def wake(self, task: greenlet, at_s: float) -> None:
        heapq.heappush(self._queue, (at_s, next(self._order), task))

    def wait(self, seconds: float) -> None:
        """Of the running task. Whoever is due earlier runs first."""
        until_s, process = self.now_s + seconds, self.current
        assert process is not None
        if not process.is_alive:
            raise Died
        if process.paused_until_s <= self.now_s and (not self._queue or self._queue[0][0] > until_s):
            self.now_s = until_s
            return
        self.wake(getcurrent(), until_s)
        self.hub.switch()

    def run(self) -> None:
        """Until nothing is left to do. Raises: Failed where that does not come; what a task raises."""
        while self._queue:
            at_s, _, task = heapq.heappop(self._queue)
            process = self.owner[task]
            if task.dead or not process.is_alive:
                continue
            if process.paused_until_s > at_s:
                self.wake(task, process.paused_until_s)
                continue
            self.now_s = max(self.now_s, at_s)
            task.switch()

    def end(self) -> None:
        """Unwind the tasks of the dead, and close their files."""
        for process in self.processes:
            process.is_alive = False
        for task in list(self.owner):
            if not task.dead:
                with suppress(Died):
                    task.throw(Died)
        for index in list(self.indexes):  # closed below: later their numbers are those of other files
            index._descriptor = -1
        for process in self.processes:
            for descriptor in process.open:
                with suppress(OSError):
                    _REAL["close"](descriptor)

    # What the operating system is asked

    def call(self, name: str, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        process = self.current
        if process is None:
            return real(*args, **kwargs)
        if not process.is_alive:
            raise Died
        if (
            name in _LOOKS and self.rng.random() < 0.8
        ):  # a look just after the call before it tells little else
            return real(*args, **kwargs)
        self._step(process)
        dies = process.calls == process.plan.dies_at
        if dies and not process.plan.after:
            self._die(process)
        result = real(*args, **kwargs)
        self._note(process, name, args, result)
        if dies:
            if name == "read":
                result.close()
            self._die(process)
        return result

    def _step(self, process: Process) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Failed("it never ends")
        process.calls += 1
        if (pause := process.plan.pauses.get(process.calls)) is not None:
            process.paused_until_s = self.now_s + pause
        self.wait(self.rng.random() * 0.004 * process.plan.slowness)
        if not process.is_alive:
            raise Died

    def _die(self, process: Process) -> None:
        process.is_alive = False
        if process.plan.loses_unsynced:
            for descriptor in process.written:
                os.ftruncate(descriptor, process.open[descriptor])
        self.hub.switch()
        raise Died  # when it is unwound

    def _note(self, process: Process, name: str, args: Any, result: Any) -> None:
        """Which bytes of whose files are synced, and when the last mark came."""
        if name in ("link", "replace") and args[1].parent.name == "done":
            self.last_marked_s = self.now_s
        if name == "open":
            process.open[result] = 0
        elif name in ("write", "writev", "pwrite") and args[0] in process.open:
            process.written.add(args[0])
        elif name == "fsync" and args[0] in process.written:
            process.open[args[0]] = os.fstat(args[0]).st_size
            process.written.discard(args[0])

    def close(self, descriptor: int) -> None:
        """A file that is closed with bytes not synced may lose them still."""
        process = self.current
        if process is not None and (not process.is_alive or descriptor in process.written):
            return  # `end` closes it
        if process is not None:
            process.open.pop(descriptor, None)
        _REAL["close"](descriptor)


class SimulatedRuntime(Runtime):
    """Clock and threads of one process."""

    def __init__(self, process: Process) -> None:
        self._process, self._world = process, process.world
        self._offset_s = process.world.rng.random() * 1e6  # no two clocks agree

    def now_s(self) -> float:
        return self._world.now_s + self._offset_s

    def sleep(self, seconds: float) -> None:
        self._world.wait(seconds)

    def repeat(self, action: Callable[[], None], *, every_s: float, name: str) -> Callable[[], None]:
        stopped = is_busy = False

        def loop() -> None:
            nonlocal is_busy
            while True:
                self._world.wait(every_s)
                if stopped:
                    return
                is_busy = True
                action()
                is_busy = False

        def stop() -> None:
            nonlocal stopped
            stopped = True
            while is_busy:
                self._world.wait(0.01)

        self._world.spawn(self._process, loop)
        return stop

    def executor(self, name: str, *, threads: int = 1) -> Executor:
        return SimulatedExecutor(self._process) if name == "commit" else Inline()


class SimulatedFuture(Future):  # type: ignore[type-arg]
    """Whoever asks for the result waits as a task does."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def result(self, timeout: float | None = None) -> Any:
        process = self._world.current
        if process is not None and not process.is_alive:
            raise Died
        if not self.done():
            task = getcurrent()
            self.add_done_callback(lambda _: self._world.wake(task, self._world.now_s))
            self._world.hub.switch()
        return super().result(0)


class SimulatedExecutor(Executor):
    """What is submitted runs as a task beside the others."""

    def __init__(self, process: Process) -> None:
        self._process, self._futures = process, list[SimulatedFuture]()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = SimulatedFuture(self._process.world)

        def work() -> None:
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._futures.append(future)
        self._process.world.spawn(self._process, work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for future in self._futures:
            with suppress(Exception):
                future.result()


class Inline(Executor):
    """At once."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


_REAL = {name: getattr(os, name) for name in (*_SWITCHED, "close", "getpid")}


@contextmanager
def patched(world: World) -> Iterator[None]:
    """Have the world make the calls of the operating system."""
    real_index, real_brief = IndexFile.__init__, Index.__init__
    real_open, real_token, real_id, real_start = (
        Path.open,
        secrets.token_hex,
        locks_module.machine_id,
        locks_module.process_start,
    )

    def switched(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: world.call(name, _REAL[name], args, kwargs)

    def noted_index(index: IndexFile, path: Path, **kwargs: Any) -> None:
        real_index(index, path, **kwargs)
        world.indexes.add(index)

    def brief_index(index: Index, *args: Any, **kwargs: Any) -> None:
        # Not kept open: it would be closed by number when it is collected, in the midst of another test.
        real_brief(index, *args, **{**kwargs, "stays_open": False})

    def process_start(pid: int) -> str:
        return "began" if world.processes[pid - 1].is_alive else ""

    try:
        for name in _SWITCHED:
            setattr(os, name, switched(name))
        os.close = world.close
        IndexFile.__init__ = noted_index  # type: ignore[method-assign]
        Index.__init__ = brief_index  # type: ignore[method-assign]
        os.getpid = lambda: _REAL["getpid"]() if world.current is None else world.current.pid
        Path.open = lambda *args, **kwargs: world.call("read", real_open, args, kwargs)  # type: ignore[method-assign]
        secrets.token_hex = lambda count=8: f"{world.rng.getrandbits(8 * count):0{2 * count}x}"
        locks_module.machine_id = lambda: "none" if world.current is None else world.current.plan.host
        locks_module.process_start = process_start
        yield
    finally:
        for name, function in _REAL.items():
            setattr(os, name, function)
        IndexFile.__init__ = real_index  # type: ignore[method-assign]
        Index.__init__ = real_brief  # type: ignore[method-assign]
        Path.open, secrets.token_hex = real_open, real_token  # type: ignore[method-assign]
        locks_module.machine_id, locks_module.process_start = real_id, real_start
