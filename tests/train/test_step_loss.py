"""The loss of a step read when the next one has been given, as on a GPU; here a CPU does so too."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

import evl_cache.train.passes as passes
import evl_cache.train.step_loss as step_loss
from evl_cache import load_head
from evl_cache.errors import EvlCacheError
from evl_cache.heads import EVLHead
from evl_cache.processes import Interrupted, Processes, ProcessPlace, StopRequests
from evl_cache.runs.directory import load_state
from evl_cache.sweep.grid import expand
from evl_cache.sweep.stage import sweep
from evl_cache.train.stage import TrainOptions, train
from evl_cache.train.step_loss import Diverged, LossReader, StepLoss
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=3, batch=4, lr=3e-3, seed=5, save_every_steps=1)
CPU = torch.device("cpu")
FINE = torch.tensor(1.0)  # the largest parameter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(step_loss, "is_read_late", lambda device: True)


def run(caches, out, *, options=OPTIONS, on_step=lambda done: None, **more):
    losses = {}

    def note(done, total, loss):
        losses[done] = loss
        on_step(done)

    train(*caches, options=options, out=out, on_step=note, **more)
    return losses


def broken_from(monkeypatch, first):
    """Make the losses of the training steps from `first` on NaN; returns the steps begun."""
    real, begun = passes.head_logits, []

    def logits(head, features, dtype=None):
        begun.append(1)
        return real(head, features, dtype) * (math.nan if len(begun) >= first else 1.0)

    monkeypatch.setattr(passes, "head_logits", logits)
    return begun


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "bottleneck")} for row in lines(path)]


def test_a_loss_is_read_when_the_next_step_has_been_given(monkeypatch):
    events = []

    class Numbers:
        def __init__(self, values):
            self.values = values.tolist()
            events.append(("given", self.values[0]))

        def read(self):
            events.append(("read", self.values[0]))
            return self.values

    monkeypatch.setattr(step_loss, "DeviceNumbers", Numbers)
    for is_late, expected in ((True, [None, 1, 2, 3]), (False, [1, 2, 3, None])):
        events.clear()
        monkeypatch.setattr(step_loss, "is_read_late", lambda device, is_late=is_late: is_late)
        reader = LossReader(Processes(), StopRequests(), CPU)
        found = [reader.give(step, torch.tensor(10.0 * step), FINE, step) for step in (1, 2, 3)]
        assert [*found, reader.read()] == [
            None if step is None else StepLoss(step=step, value=10.0 * step, samples=step)
            for step in expected
        ]
        order = [what for what, _ in events]
        late_order = ["given", *["given", "read"] * 2, "read"]
        assert order == (late_order if is_late else ["given", "read"] * 3)
        assert reader.read() is None


def test_a_number_stays_though_the_device_overwrites_it(late):
    reader, loss = LossReader(Processes(), StopRequests(), CPU), torch.tensor(1.0)
    reader.give(1, loss, FINE, 4)
    loss.fill_(math.nan)  # a replayed graph writes every loss to one place
    assert reader.read() == StepLoss(step=1, value=1.0, samples=4)


@pytest.mark.parametrize("how", [{"epochs": 3}, {"epochs": None, "steps": 7, "accumulate": 2, "ema": 0.9}])
def test_logs_states_and_weights_are_those_of_losses_read_at_once(caches, tmp_path, monkeypatch, how):
    options = replace(OPTIONS, **how)
    at_once = run(caches, tmp_path / "once", options=options)
    monkeypatch.setattr(step_loss, "is_read_late", lambda device: True)
    assert run(caches, tmp_path / "late", options=options) == at_once
    for name, read in (("steps.jsonl", lines), ("metrics.jsonl", timeless)):
        assert read(tmp_path / "late" / name) == read(tmp_path / "once" / name)
    states = [load_state(tmp_path / name) for name in ("once", "late")]
    progress = [
        {k: v for k, v in s["progress"].items() if k not in ("seconds", "epoch_seconds")} for s in states
    ]
    assert progress[0] == progress[1]
    heads = [load_head(tmp_path / name).state_dict() for name in ("once", "late")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.parametrize("every", [1, 3, None])
@pytest.mark.parametrize("first", [1, 2, 6, 7, 8, 9])  # of 4 steps an epoch
def test_nothing_is_saved_of_a_step_that_diverges_or_of_later_ones(
    caches, tmp_path, late, monkeypatch, first, every
):
    broken_from(monkeypatch, first)
    with pytest.raises(EvlCacheError, match=f"loss is nan at step {first}: training diverged"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, save_every_steps=every))
    kept = max((first - 1) // every * every if every else 0, (first - 1) // 4 * 4)
    assert [row["step"] for row in lines(tmp_path / "run" / "steps.jsonl")] == list(range(1, first))
    assert (tmp_path / "run" / "last.pt").exists() == bool(kept)
    if kept:
        state = load_state(tmp_path / "run")
        assert (state["progress"]["step"], state["progress"]["epoch"]) == (kept, (first - 1) // 4)
        assert all(torch.isfinite(value).all() for value in state["head"].values())
    assert (tmp_path / "run" / "head.safetensors").exists() == (first > 4)


def test_after_divergence_one_more_step_is_given_at_most(caches, tmp_path, late, monkeypatch):
    begun = broken_from(monkeypatch, 2)
    with pytest.raises(Diverged, match="at step 2"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, save_every_steps=None))
    assert len(begun) == 3


def test_a_state_kept_before_divergence_goes_on_as_an_uninterrupted_run(caches, tmp_path, late, monkeypatch):
    whole = run(caches, tmp_path / "whole")
    with monkeypatch.context() as patch:
        broken_from(patch, 7)
        with pytest.raises(Diverged):
            run(caches, tmp_path / "cut")
    assert run(caches, tmp_path / "cut", resume=True) == {s: x for s, x in whole.items() if s > 6}
    assert lines(tmp_path / "cut" / "steps.jsonl") == lines(tmp_path / "whole" / "steps.jsonl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_a_signal_keeps_the_state_of_the_last_whole_step(caches, tmp_path, late, number, at):
    options = replace(OPTIONS, save_every_steps=None)
    whole = run(caches, tmp_path / "whole", options=options)
    told = lambda done: done == at and os.kill(os.getpid(), number)  # noqa: E731
    with pytest.raises(Interrupted, match="--resume") as stopped:
        run(caches, tmp_path / "cut", options=options, on_step=told)
    kept = load_state(tmp_path / "cut")["progress"]["step"]
    assert kept in (at, at + 1) and f"step {kept} of 12" in str(stopped.value)
    assert [row["step"] for row in lines(tmp_path / "cut" / "steps.jsonl")] == list(range(1, kept + 1))
    rest = run(caches, tmp_path / "cut", options=options, resume=True)
    assert rest == {step: loss for step, loss in whole.items() if step > kept}


def test_a_signal_in_a_step_that_diverges_saves_nothing(caches, tmp_path, late, monkeypatch):
    broken_from(monkeypatch, 3)
    told = lambda done: done == 2 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with pytest.raises(Diverged, match="at step 3"):
        run(caches, tmp_path / "run", options=replace(OPTIONS, save_every_steps=None), on_step=told)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_processes_add_in_the_order_of_steps_and_stop_by_the_sum(late, monkeypatch):
    added = []

    def add(self, values, when):
        added.append((when, values.tolist()))
        return values + torch.tensor([0.5, 15.0 if len(added) == 2 else 0.0, 0.0], dtype=torch.float64)

    monkeypatch.setattr(Processes, "add", add)
    reader = LossReader(Processes(place=ProcessPlace(rank=1, world=2)), StopRequests(), CPU)
    stopping, found = [], []
    for step in (1, 2, 3):
        found.append(reader.give(step, torch.tensor(float(step)), FINE, 4))
        stopping.append(reader.is_stopping)
    found.append(reader.read())
    assert [(when, values[0]) for when, values in added] == [(f"at step {n}", float(n)) for n in (1, 2, 3)]
    assert [loss.value for loss in found if loss] == [1.5, 2.5, 3.5]
    assert stopping == [False, False, True] and reader.is_stopping  # another one's signal is not forgotten


def test_a_diverging_head_of_a_sweep_ends_alone(caches, tmp_path, monkeypatch):
    grids = [{"head": "decoder2", "lr": [3e-3, 1e12], "temporal": "none"}, {"head": "linear"}]
    common = {"epochs": 3, "batch": 4, "dropout": 0.0, "save_every_steps": 1}
    results = {}
    for name, is_late in (("once", False), ("late", True)):
        monkeypatch.setattr(step_loss, "is_read_late", lambda device, is_late=is_late: is_late)
        results[name] = sweep(*caches, runs=expand(grids, common), out=tmp_path / name)
    for once, late in zip(results["once"].runs, results["late"].runs, strict=True):
        assert (late.name, late.status, late.top1, late.error) == (
            once.name,
            once.status,
            once.top1,
            once.error,
        )
        folders = [tmp_path / name / "runs" / once.name for name in ("once", "late")]
        assert [p.name for p in sorted(folders[0].iterdir())] == [
            p.name for p in sorted(folders[1].iterdir())
        ]
        assert lines(folders[0] / "steps.jsonl") == lines(folders[1] / "steps.jsonl")
        if (folders[0] / "last.pt").exists():
            states = [load_state(folder) for folder in folders]
            assert states[0]["progress"]["step"] == states[1]["progress"]["step"]
    assert [row.status for row in results["late"].runs].count("diverged") == 1


@pytest.mark.parametrize("first", [3, 4, 5, 12])  # of 4 steps an epoch, and 12
def test_a_head_of_a_sweep_that_diverges_at_an_epochs_end_leaves_nothing_of_it(
    caches, tmp_path, late, monkeypatch, first
):
    real, begun = passes.head_logits, []

    def logits(head, features, *args):
        begun.append(isinstance(head, EVLHead))
        return real(head, features, *args) * (math.nan if begun[-1] and sum(begun) >= first else 1.0)

    monkeypatch.setattr(passes, "head_logits", logits)
    runs = expand(
        [{"head": "decoder2"}, {"head": "linear"}], {"epochs": 3, "batch": 4, "save_every_steps": 3}
    )
    bad, good = sweep(*caches, runs=runs, out=tmp_path / "sweep").runs
    assert (bad.status, good.status) == ("diverged", "done")
    assert bad.error.startswith(f"loss is nan at step {first}: training diverged")
    folder = tmp_path / "sweep" / "runs" / bad.name
    assert [row["step"] for row in lines(folder / "steps.jsonl")] == list(range(1, first))
    kept = max((first - 1) // 3 * 3, (first - 1) // 4 * 4)
    assert (folder / "last.pt").exists() == bool(kept)
    assert not kept or load_state(folder)["progress"]["step"] == kept
    assert len(lines(folder / "metrics.jsonl")) == (first - 1) // 4 and not (folder / "result.json").exists()
