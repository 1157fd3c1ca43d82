"""What a piece of work costs the process that does it: seconds, processor seconds and memory. Linux only.

Memory is counted as proportional share (PSS): a page that several processes map counts for each by its share. Of
mapped files only those below a given directory count, so that libraries, which other programs of the computer map and
unmap meanwhile, change nothing.
"""

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a piece of work cost.

    Attributes:
        seconds: by the clock.
        cpu_s: processor seconds of all threads.
        mb: memory that it left taken, PSS, in megabytes.
        peak_mb: the most resident memory on the way, above that at its begin, in megabytes.
    """

    seconds: float
    cpu_s: float
    mb: float
    peak_mb: float

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        """Plain JSON values, rounded."""
        return {f"{prefix}{name}": round(value, 3) for name, value in asdict(self).items()}


def cpu_seconds() -> float:
    """Processor seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def costs_of(work: Callable[[], T], *, files: Path | None = None) -> tuple[T, Costs]:
    """Do some work. `files`: mapped files below it count as memory. Returns: what it returned, and its costs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    mb, resident, cpu = memory_mb(files), _status_mb("VmRSS"), cpu_seconds()
    began = time.perf_counter()
    result = work()
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    peak = _status_mb("VmHWM") - resident
    gc.collect()
    return result, Costs(seconds=seconds, cpu_s=cpu, mb=memory_mb(files) - mb, peak_mb=peak)


def memory_mb(files: Path | None = None) -> float:
    """PSS of this process in megabytes: what has no file, and files below a directory."""
    below = None if files is None else f"{files.resolve()}/"
    total, counts = 0, False
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024 if counts else 0
            elif not line[0].isupper():  # the head of a mapping: addresses, rights, …, path
                path = [*line.split(maxsplit=5), ""][5].rstrip("\n")
                is_file = path.startswith("/") and not path.startswith(("/dev/", "/memfd:"))
                counts = not is_file or (below is not None and path.startswith(below))
    return total / _MB


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / _MB
