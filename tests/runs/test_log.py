"""The logs of a run: strict JSON, and nothing lost by a kill while a continued run rewrites them."""

import json
import math
import os
from pathlib import Path

import pytest

import evl_cache.store.disk.publish as publish
from evl_cache.errors import NotFinite
from evl_cache.runs import RunLog, read_json, read_json_lines, write_json
from tests.support.example_data import ROOT


class Killed(BaseException):
    """As a kill: nothing that catches errors sees it."""


def logs(folder):
    """Write what a run leaves that was killed in its fourth step: three steps and one epoch are in its state."""
    steps = [json.dumps({"step": step, "loss": 1.5}) for step in (1, 2, 3, 4)]
    (folder / "steps.jsonl").write_text("\n".join(steps) + '\n{"step": 5, "lo')
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')


def kept(folder):
    return [
        [row[name] for row in read_json_lines(folder / f"{file}.jsonl")]
        for file, name in (("steps", "step"), ("metrics", "epoch"))
    ]


def test_what_a_continued_run_does_again_is_dropped(tmp_path):
    logs(tmp_path)
    with RunLog(tmp_path) as log:
        log.keep(steps=3, epochs=1)
    assert kept(tmp_path) == [[1, 2, 3], [1]]


@pytest.mark.parametrize("log_number", [1, 2])
@pytest.mark.parametrize("call", ["write_text", "fsync", "replace", "fsync_directory"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_while_logs_are_rewritten_loses_no_line_of_the_state(
    tmp_path, monkeypatch, log_number, call, after
):
    logs(tmp_path)
    owner = {"write_text": Path, "fsync_directory": publish}.get(call, os)
    real, calls = getattr(owner, call), []

    def killing(*arguments, **more):
        # `replacing` syncs a file and its directory: that is counted apart.
        calls.append(1)
        if len(calls) < log_number:
            return real(*arguments, **more)
        if after:
            real(*arguments, **more)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, call, killing)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nor does a killed process tidy up
        with pytest.raises(Killed), RunLog(tmp_path) as log:
            log.keep(steps=3, epochs=1)
    assert calls
    for name, count in (("steps", 3), ("metrics", 1)):
        whole = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert len(whole) >= count and all(json.loads(line) for line in whole[:count])
    with RunLog(tmp_path) as log:
        log.keep(steps=3, epochs=1)
    assert kept(tmp_path) == [[1, 2, 3], [1]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_in_no_log(tmp_path, value):
    with RunLog(tmp_path) as log:
        log.keep(steps=0, epochs=0)
        log.step(1, {"loss": 1.0})
        with pytest.raises(NotFinite, match=f"loss is {value}"):
            log.step(2, {"loss": value})
        with pytest.raises(NotFinite, match=f"val_loss is {value}"):
            log.epoch(1, {"epoch": 1, "val_loss": value})
    assert kept(tmp_path) == [[1], []]


@pytest.mark.parametrize("content", [{"a": {"b": [1.0, math.nan]}}, {"c": (math.inf,)}])
def test_json_files_hold_numbers_only_and_stay_as_they_were(tmp_path, content):
    path = tmp_path / "result.json"
    write_json(path, {"top1": 1.5})
    with pytest.raises(NotFinite, match=r"a\.b\.1 is nan|c\.0 is inf"):
        write_json(path, content)
    assert read_json(path) == {"top1": 1.5}


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[-1e999]"])
def test_json_that_an_older_version_wrote_of_no_number_is_refused(tmp_path, text):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match="is no JSON"):
        read_json(tmp_path / "file.json")


def test_lines_are_on_the_disk_before_a_state_counts_on_them(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino) or real(number))
    with RunLog(tmp_path) as log:
        log.keep(steps=0, epochs=0)
        synced.clear()
        log.step(1, {"loss": 1.0})
        log.epoch(1, {"epoch": 1})
        log.flush()
        assert {(tmp_path / f"{name}.jsonl").stat().st_ino for name in ("steps", "metrics")} <= set(synced)
        assert kept(tmp_path) == [[1], [1]]


def test_one_function_writes_the_json_of_runs_and_commands():
    """`json.dumps` writes NaN, which is no JSON: `canonical_json.json_text` does not."""
    rooms = ("runs", "train", "sweep", "report", "show", "live", "rendered")
    sources = [path for room in rooms for path in (ROOT / "evl_cache" / room).rglob("*.py")]
    found = [path for path in [*sources, *(ROOT / "cli").glob("*.py")] if "json.dump" in path.read_text()]
    assert sources and found == []
