"""`benchmarks.device` keeps what it measured, whatever happens to it or to a measurement."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.device_cli import main_function
from benchmarks.support.device_tests import outcomes_of
from tests.support.example_data import ROOT
from tests.support.store_helpers import wait_until
from tests.support.warm_python import warm_python

# Parts of measurements that end in every way there is; `main` runs them as it does its own.
FAKE = """
import os, signal, sys, time, warnings
from pathlib import Path
import torch
from benchmarks import device
from benchmarks.support.device_runner import Measurement, Skipped

def yields(*pieces):
    def call(clock):
        yield from pieces
    return call

def raises(error, *pieces):
    def call(clock):
        yield from pieces
        raise error
    return call

def hangs(clock):
    yield {"before": 1}
    time.sleep(600)

def dies(clock):
    yield {"before": 1}
    print("an illegal address", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def forks(clock):
    yield {"worker": os.getpid()}

def warns(clock):
    warnings.warn_explicit("kernels are not used", RuntimeWarning, "/somewhere/evl_cache/choice.py", 1)
    warnings.warn("of somebody else")
    yield {"rate": 1}

def waits(clock):
    yield {"worker": os.getpid()}
    Path(os.environ["REACHED"]).touch()
    time.sleep(600)

FAKES = {
    "tests": [
        Measurement(name="first", call=forks, seconds=9),
        Measurement(name="second", call=forks, seconds=9),
        Measurement(name="raises", call=raises(ValueError("one line\\nand another"), {"kept": 2}), seconds=9),
        Measurement(name="after", call=forks, seconds=9),
        Measurement(name="no_memory", call=raises(torch.OutOfMemoryError("CUDA out of memory. Tried")), seconds=9),
        Measurement(name="hangs", call=hangs, seconds=0.5),
        Measurement(name="dies", call=dies, seconds=9),
        Measurement(name="skipped", call=raises(Skipped("not here")), seconds=9),
        Measurement(name="lacks", call=forks, seconds=9, needs=("no_such_package",)),
        Measurement(name="imports", call=raises(ModuleNotFoundError("none", name="triton")), seconds=9),
        Measurement(name="alone", call=forks, seconds=9, alone=True),
        Measurement(name="warns", call=warns, seconds=9),
        Measurement(name="last", call=yields({"a": 1}, {"b": 2}), seconds=9),
    ],
    "head": [
        Measurement(name="quick", call=yields({"rate": 3.5}), seconds=9),
        Measurement(name="slow", call=waits, seconds=500),
        Measurement(name="never", call=yields({"rate": 1}), seconds=9),
    ],
}
device._LOADED = ()
device.measurements_of = lambda part, place: FAKES[part]
device.main(sys.argv[1:])
"""


def command(*arguments: object) -> list[str]:
    return [warm_python(), "-c", FAKE, "--json", *map(str, arguments)]


def kept(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of each measurement in a file of results, by part and name."""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {f"{line['part']}.{line['name']}": line for line in lines}


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """The last line, what the file has, and every line printed, of a run whose measurements fail in every way."""
    out = tmp_path_factory.mktemp("device") / "results.jsonl"
    done = subprocess.run(
        command("--parts", "tests", "--seconds", 60, "--out", out),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]), kept(out), lines


def test_every_measurement_ends_with_a_status(run: Any) -> None:
    found = {name: told["status"] for name, told in run[0]["parts"]["tests"].items()}
    assert found == {
        "first": "ok", "second": "ok", "raises": "failed", "after": "ok", "no_memory": "failed", "hangs": "failed",
        "dies": "failed", "skipped": "skipped", "lacks": "skipped", "imports": "skipped", "alone": "ok", "warns": "ok",
        "last": "ok",
    }  # fmt: skip
    assert run[0]["counts"] == {"failed": 4, "ok": 7, "skipped": 3} and run[0]["stopped_by"] is None


def test_reasons_are_one_line_and_say_what_happened(run: Any) -> None:
    told = {name: found.get("reason", "") for name, found in run[0]["parts"]["tests"].items()}
    assert told["raises"].startswith("ValueError: one line (")
    assert told["no_memory"].startswith("OutOfMemoryError: CUDA out of memory. Tried")
    assert told["hangs"] == "ran over its time and was killed"
    assert told["dies"] == "its process ended by SIGSEGV: an illegal address"
    assert (told["skipped"], told["lacks"], told["imports"]) == (
        "not here",
        "needs no_such_package",
        "needs triton",
    )
    assert not any("\n" in reason for reason in told.values())


def test_what_was_measured_before_a_failure_is_kept(run: Any) -> None:
    found = run[0]["parts"]["tests"]
    assert found["raises"]["kept"] == 2 and found["hangs"]["before"] == 1 and found["dies"]["before"] == 1
    assert (found["last"]["a"], found["last"]["b"]) == (1, 2)
    assert found["warns"]["warnings"] == ["kernels are not used"]


def test_a_process_serves_until_something_fails_in_it(run: Any) -> None:
    found = run[0]["parts"]["tests"]
    assert found["first"]["worker"] == found["second"]["worker"] != found["after"]["worker"]
    assert found["alone"]["worker"] not in (found["first"]["worker"], found["after"]["worker"])


def test_the_file_and_the_printed_lines_say_the_same(run: Any) -> None:
    last, in_file, printed = run
    for name, found in last["parts"]["tests"].items():
        assert in_file[f"tests.{name}"] == {"part": "tests", "name": name, **found}
        assert any(line.startswith(f"tests.{name}: {found['status']} in ") for line in printed)
    assert in_file["place.setting"]["device"] == last["device"] and last["tiny"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_it_measured(tmp_path: Path, number: signal.Signals) -> None:
    out, reached = tmp_path / "results.jsonl", tmp_path / "reached"
    process = subprocess.Popen(
        command("--parts", "head", "--out", out, "--scratch", tmp_path),
        cwd=ROOT,
        env={**os.environ, "REACHED": str(reached)},
        stdout=subprocess.PIPE,
        text=True,
    )
    # What the measurement has told is in the file a moment after it waits.
    wait_until(lambda: reached.exists() and "head.slow" in kept(out), what="a measurement that waits")
    found = kept(out)
    assert found["head.quick"] == {
        "part": "head",
        "name": "quick",
        "rate": 3.5,
        "status": "ok",
        "seconds": pytest.approx(0, abs=30),
    }
    worker = found["head.slow"]["worker"]
    victim = int(
        Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1]
    )  # the parent of the worker
    os.kill(victim, number)
    said, _ = process.communicate(timeout=60)
    wait_until(lambda: not is_alive(worker), what="the worker's end")
    if number == signal.SIGKILL:
        assert kept(out)["head.slow"]["status"] == "partial"
        return
    last = json.loads(said.splitlines()[-1])
    assert process.returncode == 128 + number and last["stopped_by"] == number.name
    assert (
        last["parts"]["head"]["quick"]["rate"] == 3.5 and last["parts"]["head"]["slow"]["status"] == "partial"
    )
    assert "never" not in last["parts"]["head"]


def is_alive(pid: int) -> bool:
    """Whether a process runs, zombies left out."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_that_is_over_skips_what_is_left(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    subprocess.run(
        command("--parts", "head", "--seconds", 4, "--out", out),
        cwd=ROOT,
        env={**os.environ, "REACHED": str(tmp_path / "reached")},
        capture_output=True,
        timeout=60,
        check=True,
    )
    found = kept(out)
    assert found["head.slow"]["reason"] == "ran over its time and was killed"
    assert found["head.never"]["reason"] == "no time is left for it"


def test_a_part_that_does_not_exist_is_refused() -> None:
    done = subprocess.run(command("--parts", "heads"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected some of tests, head, stage_one, whole" in done.stderr


def test_stage_one_ends_on_a_processor(tmp_path: Path) -> None:
    found = script(tmp_path, "stage_one", seconds=60)
    assert found["device"] == "cpu" and found["tiny"]
    part = found["parts"]["stage_one"]
    assert {told["status"] for told in part.values()} == {"ok"}, part
    assert part["ours.tiny"]["clips_per_s"] > 0 and part["ours.tiny"]["seconds_by_stage"].keys() == {
        "decoding", "transfer", "device", "writing",
    }  # fmt: skip


@pytest.mark.soak
def test_every_part_ends_on_a_processor(tmp_path: Path) -> None:
    found = script(tmp_path, "tests,head,stage_one,whole", seconds=400)
    assert list(found["parts"]) == ["place", "tests", "head", "stage_one", "whole"]
    assert set(found["counts"]) == {"ok", "skipped"}, found["parts"]
    whole = found["parts"]["whole"]
    assert whole["train.device"]["loss_by_epoch"] == whole["train.disk"]["loss_by_epoch"]
    assert whole["sweep"]["runs_alone"] == whole["sweep"]["heads"]


def script(folder: Path, parts: str, *, seconds: float) -> dict[str, Any]:
    """The last line of the script."""
    arguments = [
        "--json",
        "--parts",
        parts,
        "--seconds",
        str(seconds),
        "--out",
        str(folder / "results.jsonl"),
    ]
    done = subprocess.run(
        [warm_python(), "-m", "benchmarks.device", *arguments, "--scratch", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * seconds,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


LACKING = """
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"av", "awscrt", "click", "decord", "numcodecs", "open_clip", "timm", "zarr"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Lacking())
from pathlib import Path
from benchmarks import device
from benchmarks.support.device_place import TINY, Place

place = Place(device="cpu", sizes=TINY, scratch=Path())
print(*(len(device.measurements_of(part, place)) for part in ("tests", "head", "stage_one")))
"""


def test_parts_need_no_package_that_some_of_their_measurements_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LACKING], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert all(int(number) > 2 for number in done.stdout.split())


def test_the_command_line_is_found_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "evl_cache_cli"]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        found = main_function()
    assert found.__module__ == "evl_cache_cli.main"
    assert Path(found.__code__.co_filename) == ROOT / "cli" / "main.py"  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.partition(".")[0] == "evl_cache_cli"]:
        monkeypatch.delitem(sys.modules, name)


def test_outcomes_of_tests_are_told_by_name() -> None:
    report = """<testsuites><testsuite>
        <testcase classname="tests.a" name="good"/>
        <testcase classname="tests.a" name="bad"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
        <testcase classname="tests.a" name="left"><skipped message="needs a CUDA device"/></testcase>
        <testcase classname="" name="tests.b"><error message="collection failure">ImportError: no av</error></testcase>
    </testsuite></testsuites>"""
    assert outcomes_of(report) == {
        "tests.a::good": ("passed", ""),
        "tests.a::bad": ("failed", "assert 1 == 2"),
        "tests.a::left": ("skipped", "needs a CUDA device"),
        "::tests.b": ("failed", "collection failure"),
    }
