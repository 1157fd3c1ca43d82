"""Measurements one after another in processes that may hang, crash or run out of memory; each result is kept at once.

A worker is forked from a process that has loaded torch and never touches a GPU. It takes measurements until one of them
fails; the next one then gets a new worker, so that a broken CUDA context ends nothing else.
"""

import ctypes
import gc
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

Values = Mapping[str, Any]
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LEAST_S = 5.0
_GRACE_S = 2.0  # for a measurement that looks at the clock itself, before its process is killed


class Skipped(Exception):
    """What a measurement raises where it cannot be made here, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When a measurement must be done.

    Attributes:
        deadline: by `time.monotonic`.
    """

    deadline: float

    @property
    def left_s(self) -> float:
        """The seconds that are left."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing to measure.

    Attributes:
        name: within its part.
        call: yields values as they are measured; what was yielded before it failed is kept.
        seconds: the most that it may take.
        needs: packages without which it is skipped.
        alone: it needs a process that nothing was measured in before.
    """

    name: str
    call: Callable[[Clock], Iterator[Values]]
    seconds: float
    needs: tuple[str, ...] = ()
    alone: bool = False


@dataclass(kw_only=True)
class Results:
    """What was measured, kept as it comes.

    Attributes:
        file: a line of JSON for each result, on the disk before the next measurement begins; None keeps no file.
        say: told each result in a line.
        parts: values and status by part and measurement.
    """

    file: TextIO | None
    say: Callable[[str], None]
    parts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def add(self, part: str, name: str, found: Values) -> None:
        """Keep a result, or what there is of it so far (status `partial`)."""
        self.parts.setdefault(part, {})[name] = dict(found)
        self.write({"part": part, "name": name, **found})
        if found["status"] != "partial":
            self.say(f"{part}.{name}: {_shortly(found)}")

    def write(self, line: Values) -> None:
        """Write a line and wait until the disk has it."""
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            with suppress(OSError):  # a pipe or a terminal
                os.fsync(self.file.fileno())


def _shortly(found: Values) -> str:
    rest = {name: value for name, value in found.items() if name not in ("status", "reason", "seconds")}
    told = json.dumps(rest) if rest else ""
    reason = f": {found['reason']}" if "reason" in found else ""
    return f"{found['status']} in {found['seconds']:.1f} s{reason} {told}".rstrip()


class Worker:
    """A forked process that takes measurements. `end` it.

    Args:
        measurements: that it may be asked for, by number.
    """

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in `end`
        asks_read, asks_write = os.pipe()
        tells_read, tells_write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            os.close(asks_write)
            os.close(tells_read)
            _become_worker(parent, self.errors.fileno())
            _serve(measurements, asks_read, tells_write)
        os.close(asks_read)
        os.close(tells_write)
        self._asks, self._tells = asks_write, tells_read
        self._rest = b""

    def measure(self, number: int, clock: Clock, on_piece: Callable[[Values], None]) -> dict[str, Any]:
        """Have a measurement made. Return its status, and why it failed if it did; the worker is then of no more use."""
        os.write(self._asks, json.dumps([number, clock.deadline]).encode() + b"\n")
        for told in self._answers(clock.deadline + _GRACE_S):
            if "piece" in told:
                on_piece(told["piece"])
            else:
                return told
        if time.monotonic() >= clock.deadline + _GRACE_S:
            self.end()
            return {"status": "failed", "reason": "ran over its time and was killed"}
        return {"status": "failed", "reason": self._why_it_ended()}

    def _answers(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Yield what the worker says, until it ends or time is over."""
        while (left := deadline - time.monotonic()) > 0:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                yield json.loads(line)
                continue
            if select.select([self._tells], [], [], left)[0]:
                more = os.read(self._tells, 1 << 16)
                if not more:
                    return
                self._rest += more

    def _why_it_ended(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"its process {how}" + (f": {said[-1][:200]}" if said else "")

    def end(self) -> None:
        """Kill it and what it started."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        for number in (self._asks, self._tells):
            with suppress(OSError):
                os.close(number)
        self._asks = self._tells = -1
        self.errors.close()


def _become_worker(parent: int, errors: int) -> None:
    """In the forked process: a group of its own, which does not outlive the parent, and whose output is set aside."""
    os.setsid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(errors, 1)
    os.dup2(errors, 2)


def _serve(measurements: Sequence[Measurement], asks: int, tells: int) -> NoReturn:
    """Make the measurements that are asked for, until one fails or nobody asks any more."""

    def tell(what: Values) -> None:
        os.write(tells, json.dumps(what, default=str).encode() + b"\n")

    status = 0
    try:
        for line in os.fdopen(asks, "rb"):
            number, deadline = json.loads(line)
            ended = _measured(measurements[number], Clock(deadline=deadline), tell)
            tell(ended)
            if ended["status"] == "failed":
                break
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)  # what the parent has open is not closed twice


def _measured(measurement: Measurement, clock: Clock, tell: Callable[[Values], None]) -> dict[str, Any]:
    try:
        for piece in measurement.call(clock):
            tell({"piece": piece})
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except ModuleNotFoundError as error:
        return {"status": "skipped", "reason": f"needs {error.name}"}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": one_line(error)}
    return {"status": "ok"}


def one_line(error: BaseException) -> str:
    """Say an error in one line: its class, the first line of its message, and the line of ours that raised it."""
    said = (str(error).strip().splitlines() or [""])[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/evl_cache/" in f.filename or "/benchmarks/" in f.filename] or frames
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line or ''})" if ours else ""
    return f"{type(error).__name__}: {said}{where}"


def run_part(
    part: str, measurements: Sequence[Measurement], results: Results, *, deadline: float, share: float = 1.0
) -> None:
    """Make the measurements of a part, none of which takes it beyond `deadline`; failures are results too.

    Args:
        share: of the most that each may take, where there is less time than usual; a few seconds it gets in any case.
    """
    worker: Worker | None = None
    try:
        for number, measurement in enumerate(measurements):
            if worker is not None and measurement.alone:
                worker.end()
                worker = None
            started = time.monotonic()
            found: dict[str, Any] = {}

            def keep(piece: Values, name: str = measurement.name, found: dict[str, Any] = found) -> None:
                found.update(piece)
                results.add(part, name, {**found, "status": "partial"})

            lacking = [package for package in measurement.needs if not is_there(package)]
            if lacking:
                ended = {"status": "skipped", "reason": f"needs {', '.join(lacking)}"}
            elif started >= deadline:
                ended = {"status": "skipped", "reason": "no time is left for it"}
            else:
                worker = worker or Worker(measurements)
                most = max(share * measurement.seconds, min(_LEAST_S, measurement.seconds))
                clock = Clock(deadline=min(deadline, started + most))
                ended = worker.measure(number, clock, keep)
                if ended["status"] == "failed" or measurement.alone:
                    worker.end()
                    worker = None
            took = round(time.monotonic() - started, 2)
            results.add(part, measurement.name, {**found, **ended, "seconds": took})
    finally:
        if worker is not None:
            worker.end()


def is_there(package: str) -> bool:
    """Whether a package can be imported."""
    return package in sys.modules or find_spec(package) is not None
