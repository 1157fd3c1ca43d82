"""The checks of a device as measurements, and the other tests that are marked `gpu`, where pytest is installed."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from importlib import import_module

from benchmarks.support import device_checks as checks
from benchmarks.support.device_cli import ROOT
from benchmarks.support.device_place import Place
from benchmarks.support.device_runner import Clock, Measurement, Skipped, Values

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
STORE = ("numcodecs", "awscrt")
Check = Callable[[Place], Iterator[Values]]


def measurements(place: Place) -> list[Measurement]:
    """Every check, in order; the quickest and the most telling come first."""
    found = [
        # Kernels are compiled when they are first used.
        _measurement(
            place,
            f"step.{path or 'ours'}.{precision}",
            _step(precision, path),
            45 if path == "kernels" else 20,
        )
        for path in reversed(checks.all_paths(place))
        for precision in PRECISIONS
    ]
    found += [
        _measurement(place, f"heads.{p}", _heads(p), 20, needs=STORE)
        for p in ("float32", place.half, "float16")
    ]
    found.append(_measurement(place, "maps_made_again", checks.maps_made_again, 10, needs=STORE))
    found += [
        _measurement(place, name, check, 25, needs=STORE)
        for name, check in {
            "batches_bit_for_bit": _training("batches_bit_for_bit", None),
            "batches_bit_for_bit.device": _training("batches_bit_for_bit", "device"),
            "pinned_against_pageable": _training("pinned_against_pageable"),
            "kept_samples": _training("kept_samples"),
            "sweep_against_runs": _training("sweep_against_runs"),
        }.items()
    ]
    found += [
        _measurement(
            place, "extraction_twice", _training("extraction_twice"), 25, needs=("timm", "av", *STORE)
        ),
        _measurement(
            place,
            "rows_on_a_stream_of_their_own",
            _training("rows_on_a_stream_of_their_own"),
            60,
            needs=("timm", "av", *STORE),
        ),
        _measurement(place, "one_process_wrapped", _training("one_process_wrapped"), 20, needs=STORE),
        _measurement(
            place, "two_processes_on_one_device", _training("two_processes_on_one_device"), 60, needs=STORE
        ),
        _measurement(
            place, "largest_on_gpu", _training("largest_batch_is_found"), 30, needs=STORE, alone=True
        ),
        _measurement(
            place,
            "out_of_memory.train",
            _training("want_of_memory_is_one_line", "train"),
            20,
            needs=("click", *STORE),
            alone=True,
        ),
        _measurement(
            place,
            "out_of_memory.extract",
            _training("want_of_memory_is_one_line", "extract"),
            30,
            needs=("click", "av", "timm", *STORE),
            alone=True,
        ),
        Measurement(name="pytest", call=lambda clock: _pytest(place, clock), seconds=60, needs=("pytest",)),
    ]
    # A name comes twice where the half precision of the device is float16.
    return list({measurement.name: measurement for measurement in found}.values())


def _measurement(
    place: Place, name: str, check: Check, seconds: float, *, needs: tuple[str, ...] = (), alone: bool = False
) -> Measurement:
    return Measurement(name=name, call=lambda clock: check(place), seconds=seconds, needs=needs, alone=alone)


def _step(precision: str, path: str | None) -> Check:
    return lambda place: checks.step_against_twin(place, precision, path)


def _heads(precision: str) -> Check:
    return lambda place: checks.heads_train(place, precision)


def _training(name: str, *more: object) -> Check:
    """A check of `device_trainings`, which is loaded when it is made: it needs packages that others do not."""

    def check(place: Place) -> Iterator[Values]:
        module = import_module("benchmarks.support.device_trainings")
        made: Iterator[Values] = getattr(module, name)(place, *more)
        yield from made

    return check


def _pytest(place: Place, clock: Clock) -> Iterator[Values]:
    """The tests marked `gpu` outside tests/gpu, whose checks were made already; failures by name, in a line each."""
    files = marked_files()
    if not files:
        raise Skipped("no test is marked gpu")
    report = place.scratch / "pytest.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    environment = os.environ | ({"EVL_CACHE_REQUIRE_GPU": "1"} if place.is_gpu else {})
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=max(1.0, clock.left_s - 1),
        check=False,
    )
    if not report.is_file():
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    outcomes = outcomes_of(report.read_text(encoding="utf-8"))
    failed = {name: reason for name, (outcome, reason) in outcomes.items() if outcome == "failed"}
    counts = {kind: sum(o == kind for o, _ in outcomes.values()) for kind in ("passed", "failed", "skipped")}
    yield {**counts, "failures": failed, "files": files}
    assert not failed, f"{len(failed)} failed"


def marked_files() -> list[str]:
    """Files of tests that hold one for a GPU."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        is_checks = path.parent.name == "gpu"
        if not is_checks and "mark.gpu" in path.read_text(encoding="utf-8"):
            found.append(str(path.relative_to(ROOT)))
    return found


def outcomes_of(report: str) -> dict[str, tuple[str, str]]:
    """What became of each test of a JUnit report, and the line that says why."""
    outcomes = {}
    for case in ET.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes[name] = ("passed", "")
        for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            told = case.find(kind)
            if told is not None:
                said = (told.get("message") or told.text or "").strip().splitlines()
                outcomes[name] = (outcome, said[0][:300] if said else "")
    return outcomes
