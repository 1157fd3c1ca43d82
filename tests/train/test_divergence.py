"""A training that diverges saves, scores and ranks nothing of it; what is kept is healthy, and goes on."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import evl_cache.runs.scoring as scoring
import evl_cache.train.step_loss as step_loss
from evl_cache import load_head
from evl_cache.errors import NotFinite, UsageError, WeightsError
from evl_cache.processes import Interrupted
from evl_cache.runs import Scores, ViewSums, class_probabilities, save_head
from evl_cache.runs.directory import load_state, save_state
from evl_cache.runs.evaluate import evaluate
from evl_cache.runs.finite import extremes, not_finite
from evl_cache.sweep.grid import expand
from evl_cache.sweep.shared_pass import SweepPass
from evl_cache.sweep.stage import read_sweep, sweep
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.stage import TrainOptions, train
from evl_cache.train.step_loss import Diverged
from evl_cache.untrusted.json_text import parse_json
from evl_cache_cli.main import cli
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=3, batch=4, lr=3e-3, seed=5)
RUINED = replace(OPTIONS, lr=1e30)  # one step makes parameters of 1e30: numbers, by which logits are none

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request, monkeypatch):
    monkeypatch.setattr(step_loss, "is_read_late", lambda device: request.param)


def files(run):
    return {path.name for path in run.iterdir()}


def lines(path):
    return [parse_json(line) for line in path.read_text().splitlines()]


def with_gradients(monkeypatch, at_step, value):
    """Have the gradients of one parameter be `value` in a step, whose loss is a number."""
    finish = Optimisation.finish

    def spoil(self, step):
        if step + 1 == at_step:
            self.head.classifier.bias.grad.fill_(value)
        finish(self, step)

    monkeypatch.setattr(Optimisation, "finish", spoil)


def with_logits(monkeypatch, value, *, from_call):
    """Have the first row of logits be `value` in each scoring of a batch, from a call on."""
    real, calls = scoring.head_logits, []

    def logits(*arguments):
        calls.append(1)
        found = real(*arguments).clone()
        if len(calls) >= from_call:
            found[0] = value
        return found

    monkeypatch.setattr(scoring, "head_logits", logits)


def healthy(run):
    state = load_state(run)
    return not_finite(state) is None and not_finite(load_head(run).state_dict()) is None


def test_a_run_whose_one_step_ruins_its_head_leaves_no_head_and_no_score(caches, tmp_path, late):
    with pytest.raises(Diverged, match=r"logits of 5 clips .* 'v0' after step 1: training diverged"):
        train(*caches, options=replace(RUINED, epochs=None, steps=1), out=tmp_path / "run")
    assert files(tmp_path / "run") == {"config.json", "metrics.jsonl", "steps.jsonl"}
    assert lines(tmp_path / "run" / "metrics.jsonl") == []


def test_a_state_between_epochs_is_proved_by_a_forward_pass(caches, tmp_path, late):
    with pytest.raises(Diverged, match="after step 1: training diverged"):
        train(*caches, options=replace(RUINED, save_every_steps=1), out=tmp_path / "run")
    assert "last.pt" not in files(tmp_path / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [None, 1])
def test_gradients_that_are_no_numbers_end_a_run_whose_loss_is_one(
    caches, tmp_path, late, monkeypatch, value, every
):
    with_gradients(monkeypatch, 6, value)
    with pytest.raises(Diverged, match="after step 6: training diverged"):
        train(*caches, options=replace(OPTIONS, save_every_steps=every), out=tmp_path / "run")
    assert load_state(tmp_path / "run")["progress"]["step"] == (4 if every is None else 5)
    assert healthy(tmp_path / "run")
    assert [row["step"] for row in lines(tmp_path / "run" / "steps.jsonl")] == [1, 2, 3, 4, 5]


def test_moments_that_overflow_end_a_run_whose_parameters_are_numbers(caches, tmp_path, late, monkeypatch):
    with_gradients(monkeypatch, 2, 1e25)  # its square is infinite: this parameter would never move again
    with pytest.raises(Diverged, match=r"optimizer\.state\.\d+\.exp_avg_sq is NaN or infinite after step 4"):
        train(*caches, options=OPTIONS, out=tmp_path / "run")
    assert files(tmp_path / "run") == {"config.json", "metrics.jsonl", "steps.jsonl"}
    assert lines(tmp_path / "run" / "metrics.jsonl") == []


def test_float16_that_overflows_at_any_scale_is_told(caches, tmp_path, monkeypatch):
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, **k | {"init_scale": 2.0**-30}))
    with pytest.raises(Diverged, match="float16 gradients overflow at any scale"):
        train(*caches, options=replace(OPTIONS, precision="float16"), out=tmp_path / "run")
    assert "last.pt" not in files(tmp_path / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_validation_that_is_no_number_keeps_the_epoch_before_and_a_resumed_run_goes_on(
    caches, tmp_path, monkeypatch, value
):
    train(*caches, options=OPTIONS, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        with_logits(patch, value, from_call=3)  # two batches an epoch
        with pytest.raises(Diverged, match=r"logits of 2 clips .* after step 8: training diverged"):
            train(*caches, options=OPTIONS, out=tmp_path / "cut")
    assert healthy(tmp_path / "cut") and load_state(tmp_path / "cut")["progress"]["epoch"] == 1
    assert len(lines(tmp_path / "cut" / "metrics.jsonl")) == 1
    assert "result.json" not in files(tmp_path / "cut")
    for name in ("best", "head"):
        best = load_file(tmp_path / "cut" / f"{name}.safetensors")
        state = load_state(tmp_path / "cut")["head"]
        assert all(torch.equal(best[key], state[key]) for key in state)
    train(*caches, options=OPTIONS, out=tmp_path / "cut", resume=True)
    whole, cut = (load_head(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.fixture
def trained(caches, tmp_path):
    train(*caches, options=replace(OPTIONS, epochs=1), out=tmp_path / "run")
    return tmp_path / "run"


def spoil_head(run, value):
    tensors = load_file(run / "head.safetensors")
    tensors["classifier.bias"] = torch.full_like(tensors["classifier.bias"], value)
    save_file(tensors, run / "head.safetensors")


def test_a_poisoned_state_of_an_older_version_is_not_gone_on_with(caches, trained):
    state = load_state(trained)
    state["head"]["classifier.weight"][0, 0] = math.nan
    torch.save(state, trained / "last.pt")
    with pytest.raises(
        NotFinite, match=r"last\.pt: head\.classifier\.weight is NaN .* another --out"
    ) as told:
        train(*caches, options=replace(OPTIONS, epochs=1), out=trained, resume=True)
    assert "\n" not in str(told.value)


def test_a_poisoned_state_of_one_head_of_a_sweep_ends_that_head_alone(caches, tmp_path):
    runs = expand([{"head": ["decoder2", "linear"]}], {"epochs": 2, "batch": 4})
    sweep(*caches, runs=runs, out=tmp_path)
    folder = tmp_path / "runs" / runs[0].name
    state = load_state(folder)
    state["head"]["classifier.weight"][0, 0] = math.nan
    torch.save(state, folder / "last.pt")
    (folder / "result.json").unlink()
    log = (folder / "metrics.jsonl").read_text()
    bad, good = sweep(*caches, runs=runs, out=tmp_path, resume=True).runs
    assert (bad.status, good.status) == ("diverged", "done") and "had diverged" in (bad.error or "")
    assert (folder / "metrics.jsonl").read_text() == log != ""


def test_nothing_that_is_no_number_is_written_as_a_state_or_a_head(trained):
    before = {name: (trained / name).read_bytes() for name in ("last.pt", "head.safetensors")}
    state, head = load_state(trained), load_head(trained)
    state["optimizer"]["state"][0]["exp_avg"][:] = math.inf
    with pytest.raises(NotFinite, match=r"exp_avg is NaN or infinite"):
        save_state(trained, state)
    with pytest.raises(NotFinite, match=r"progress\.epoch_loss_sum is NaN or infinite"):
        save_state(trained, {**load_state(trained), "progress": {"epoch_loss_sum": math.nan}})
    with torch.no_grad():
        head.classifier.bias[1] = -math.inf
    with pytest.raises(NotFinite, match=r"classifier\.bias is NaN or infinite"):
        save_head(trained, head)
    assert {name: (trained / name).read_bytes() for name in before} == before


def test_a_head_of_an_older_version_that_is_no_number_has_no_score(caches, trained):
    spoil_head(trained, math.nan)
    with pytest.raises(WeightsError, match=r"classifier\.bias is NaN or infinite, as that run had diverged"):
        evaluate(trained, caches[1])


def test_a_head_whose_logits_overflow_has_no_score(caches, trained, monkeypatch):
    with_logits(monkeypatch, math.inf, from_call=1)
    with pytest.raises(
        NotFinite, match=r"val: logits of 1 clip .* there is no score; use --precision float32"
    ):
        evaluate(trained, caches[1])


def test_logits_of_any_process_that_are_no_numbers_are_refused_by_all(caches):
    class Loaded:
        cache, labels = caches[1], caches[1].labels

    mine, theirs = ViewSums(), ViewSums()
    mine.add_logits(torch.eye(3), torch.tensor([0, 1, 2]), [0, 1, 2])
    theirs.add_logits(torch.tensor([[0.0, 1, -math.inf]]), torch.tensor([1]), [4])
    with pytest.raises(NotFinite, match="logits of 1 clip are NaN or infinite, first those of 'v4'"):
        scoring.scores_of([mine, theirs], Loaded())
    assert scoring.scores_of([mine], Loaded()).top(1) == 100


@pytest.mark.parametrize("wrong", [{"probabilities": np.full((2, 3), np.nan)}, {"loss": math.nan}])
def test_scores_of_what_is_no_number_cannot_be_made(wrong):
    fine = {"probabilities": np.full((2, 3), 1 / 3), "loss": 1.0}
    with pytest.raises(NotFinite):
        Scores(clips=np.arange(2), labels=np.zeros(2, dtype=np.int64), **fine | wrong)


def test_huge_logits_have_a_loss_that_is_a_number():
    sums = ViewSums()
    sums.add_logits(torch.tensor([[3e38, -3e38]]), torch.tensor([1]), [0])
    assert math.isfinite(sums.loss) and sums.loss == pytest.approx(6e38)
    assert class_probabilities(torch.tensor([3e38, -3e38])).tolist() == [1, 0]


def test_probabilities_of_what_is_no_number_are_refused():
    with pytest.raises(NotFinite, match="they have no probabilities"):
        class_probabilities(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_largest_magnitude_tells_of_any_value_that_is_no_number(value):
    fine = [torch.randn(3, 4), torch.empty(0), torch.tensor(-7.0)]
    assert float(extremes(fine)) == 7 and float(extremes([])) == 0
    assert not math.isfinite(float(extremes([*fine, torch.tensor([1.0, value, 2.0] * 40)])))
    assert not_finite({"a": {"b": torch.ones(2)}, "n": 3}) is None
    assert not_finite({"a": {"b": torch.tensor([0.0, value])}, "n": 3}) == "a.b"
    assert not_finite({"a": {"b": torch.ones(2)}, "n": {"m": value}}) == "n.m"


def test_a_diverged_run_of_a_sweep_is_told_and_neither_averaged_nor_ranked(caches, tmp_path):
    runs = expand([{"head": "decoder2", "lr": [1e-3, 1e30], "seed": [0, 1]}], {"epochs": 1, "batch": 16})
    result = sweep(*caches, runs=runs, out=tmp_path / "sweep")
    bad = [row for row in result.runs if row.status == "diverged"]
    assert [row.name for row in bad] == [run.name for run in runs if run.options.lr == 1e30]
    assert all("after step 1: training diverged" in (row.error or "") and row.top1 is None for row in bad)
    (group,) = result.groups
    assert group.runs == 2 and "1e+30" not in group.group
    for row in bad:
        assert not {"result.json", "best.safetensors", "head.safetensors", "last.pt"} & files(
            tmp_path / "sweep" / "runs" / row.name
        )
    again = sweep(*caches, runs=runs, out=tmp_path / "sweep", resume=True)
    assert again.runs == result.runs and again.passes == ()
    assert parse_json((tmp_path / "sweep" / "sweep.json").read_bytes())["runs"]
    assert read_sweep(tmp_path / "sweep").groups == result.groups


def test_a_sweep_that_is_stopped_keeps_which_heads_had_diverged(caches, tmp_path, monkeypatch):
    runs = expand([{"head": "linear", "lr": [1e-3, 1e30]}], {"epochs": 3, "batch": 4, "save_every_steps": 1})

    def interrupt(self):
        if self.members[0].trainer.steps_done == 4:
            raise Interrupted("stopped", signal.SIGINT)

    monkeypatch.setattr(SweepPass, "_interrupt_if_asked", interrupt)
    with pytest.raises(Interrupted):
        sweep(*caches, runs=runs, out=tmp_path / "sweep")
    rows = {row.name: row.status for row in read_sweep(tmp_path / "sweep").runs}
    assert sorted(rows.values()) == ["diverged", "waiting"]


def test_the_command_ends_in_one_line_and_all_its_json_is_strict(caches, tmp_path):
    words = ["train", "--cache", caches[0].path, "--val-cache", caches[1].path, "--head", "decoder2"]
    words += ["--batch", "4", "--device", "cpu", "--lr", "1e30", "--steps", "1", "--out", tmp_path / "run"]
    done = CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)
    assert isinstance(done.exception, UsageError) and "\n" not in str(done.exception)
    assert "training diverged; use a lower --lr" in str(done.exception)
    for path in (tmp_path / "run").glob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            parse_json(text)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "dropout", "label_smoothing", "ema", "grad_clip"])
def test_an_option_that_is_no_number_is_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        replace(OPTIONS, **{name: value})


@pytest.mark.parametrize("name", ["seed", "order_seed"])
@pytest.mark.parametrize("value", [-1, 2**64, -(2**70)])
def test_a_seed_out_of_range_is_refused_where_options_are_made(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}; expected 0 to {2**64 - 1}"):
        replace(OPTIONS, **{name: value})


def test_the_largest_seed_trains(caches, tmp_path):
    train(*caches, options=replace(OPTIONS, epochs=1, seed=2**64 - 1), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["seed"] == 2**64 - 1
