"""Everything that one visit to a machine with a GPU must answer: `python -m benchmarks.device --json --out device.jsonl`.

Four parts, each bounded in time: `tests` (is it right), `head` (training steps of the decoder and its plain twin),
`stage_one` (the tower alone, and extraction), `whole` (trainings from the disk and from memory, a sweep). A measurement
that fails, hangs or runs out of memory ends alone, with its reason. Each result is printed and written to --out as it
comes, so that a run that is cut leaves what it had. Without a CUDA device, or with --tiny, sizes are tiny: then the
figures say nothing, and only the ways are tried. Needs the repository and torch; what a part needs beside them is said
where it lacks. The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

# Before torch is loaded: a process that has asked CUDA for its devices leaves forked ones without them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from benchmarks.support.device_place import TINY, Place, Sizes, described_machine
from benchmarks.support.device_runner import Clock, Measurement, Results, Values, is_there, run_part

# Shares of the time that is left when a part begins.
PARTS = {"tests": 5, "head": 5, "stage_one": 2, "whole": 3}
DEFAULT_SECONDS = 480.0
_LOOKS_S = 60.0  # to find the device
# What workers share with the process that they are forked from, so that each starts at once.
_LOADED = (
    "evl_cache.train",
    "evl_cache.sweep",
    "evl_cache.extract.stage",
    "timm",
    "open_clip",
    "torch.profiler",
)


class Stopped(Exception):
    """A signal asked to stop.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def measurements_of(part: str, place: Place) -> list[Measurement]:
    """What is measured in a part. Raises: ImportError where a package of the whole part is missing."""
    function: Callable[[Place], list[Measurement]] = import_module(
        f"benchmarks.support.device_{part}"
    ).measurements
    return function(place)


def run(arguments: argparse.Namespace, results: Results, scratch: Path) -> dict[str, Any]:
    """Measure the parts asked for. Returns: what it ran on."""
    deadline = time.monotonic() + arguments.seconds
    looking = [Measurement(name="machine", call=_machine, seconds=_LOOKS_S)]
    run_part("place", looking, results, deadline=deadline)
    machine = results.parts["place"]["machine"]
    place = _place(arguments, machine, scratch)
    setting = {
        "device": place.device,
        "tiny": place.sizes is TINY,
        "sizes": asdict(place.sizes),
        "half": place.half,
    }
    results.write({"part": "place", "name": "setting", "status": "ok", **setting})
    results.say(f"device {place.device}, {'tiny' if setting['tiny'] else 'full'} sizes, {place.half}")
    for name in _LOADED:
        if is_there(name.partition(".")[0]):
            with suppress(Exception):  # what fails to load is told by what needs it
                import_module(name)
    left = list(arguments.parts)
    while left:
        part, *rest = left
        now = time.monotonic()
        share = PARTS[part] / sum(PARTS[name] for name in left)
        ends = now + share * max(0.0, deadline - now)
        share = min(1.0, arguments.seconds / DEFAULT_SECONDS)
        _part(part, place, results, only=arguments.only.split(","), deadline=ends, share=share)
        left = rest
    return setting


def _part(
    part: str, place: Place, results: Results, *, only: Sequence[str], deadline: float, share: float
) -> None:
    try:
        measured = measurements_of(part, place)
    except ModuleNotFoundError as error:
        results.add(part, "all", {"status": "skipped", "reason": f"needs {error.name}", "seconds": 0.0})
        return
    wanted = [m for m in measured if any(fnmatch(f"{part}.{m.name}", pattern) for pattern in only)]
    run_part(part, wanted, results, deadline=deadline, share=share)


def _machine(clock: Clock) -> Iterator[Values]:
    yield described_machine()


def _place(arguments: argparse.Namespace, machine: Values, scratch: Path) -> Place:
    device = arguments.device or ("cuda" if "card" in machine else "cpu")
    tiny = arguments.tiny or not device.startswith("cuda")
    sizes = TINY if tiny else Sizes()
    return Place(
        device=device, sizes=sizes, scratch=scratch, has_bfloat16=bool(machine.get("bfloat16", True))
    )


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}; expected some of {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and print everything as the last line, also where a signal ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), metavar="tests,head,stage_one,whole")
    parser.add_argument(
        "--only", default="*", metavar="PATTERNS", help="such measurements alone, as whole.*,head.step.256"
    )
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="of all parts [%(default)s]")
    parser.add_argument(
        "--out", type=Path, default=Path("device.jsonl"), help="results as they come [%(default)s]"
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu [cuda where there is one]")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as on a CPU")
    parser.add_argument("--scratch", type=Path, help="where caches are written, 15 GB [a temporary folder]")
    arguments = parser.parse_args(given)
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    started, stopped, setting = time.monotonic(), None, dict[str, Any]()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as file:
        results = Results(file=file, say=lambda line: print(line, flush=True))
        try:
            with tempfile.TemporaryDirectory(prefix="evl-cache-bench-", dir=arguments.scratch) as scratch:
                setting = run(arguments, results, Path(scratch))
        except Stopped as signalled:
            stopped = signalled
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        found = {
            "benchmark": "device",
            **setting,
            "seconds": round(time.monotonic() - started, 1),
            "stopped_by": None if stopped is None else str(stopped),
            "counts": _counts(results),
            "parts": results.parts,
        }
        results.write({"part": "all", "name": "summary", "status": "ok", "counts": found["counts"]})
    print(json.dumps(found), flush=True)
    if stopped is not None:
        sys.exit(128 + stopped.number)


def _counts(results: Results) -> dict[str, int]:
    statuses = [found["status"] for part in results.parts.values() for found in part.values()]
    return {status: statuses.count(status) for status in sorted(set(statuses))}


if __name__ == "__main__":
    main()
