"""What a run says of itself: the mean loss of an epoch, the seconds that it took, in one part or several."""

from dataclasses import replace

import pytest
import torch

from evl_cache.runs import read_json, read_json_lines
from evl_cache.runs.directory import load_state
from evl_cache.sweep.grid import expand
from evl_cache.sweep.stage import read_sweep, sweep
from evl_cache.train.result import RunState
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=2, batch=4, lr=3e-2, seed=5)
SIZES = (4, 4, 4, 1)  # of the batches of an epoch of 13 clips

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


def train_losses(run):
    return [row["train_loss"] for row in read_json_lines(run / "metrics.jsonl")]


def means_over_samples(run):
    losses = [row["loss"] for row in read_json_lines(run / "steps.jsonl")]
    epochs = [losses[start : start + len(SIZES)] for start in range(0, len(losses), len(SIZES))]
    return [sum(x * n for x, n in zip(epoch, SIZES, strict=True)) / sum(SIZES) for epoch in epochs]


class Killed(Exception):
    pass


def killed_at(step):
    def on_step(done, total, loss):
        if done == step:
            raise Killed

    return on_step


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(caches, tmp_path):
    train(*caches, options=OPTIONS, out=tmp_path / "run")
    assert train_losses(tmp_path / "run") == pytest.approx(means_over_samples(tmp_path / "run"), rel=1e-12)


@pytest.mark.parametrize("at", [2, 6, 8])
def test_so_it_is_where_a_run_was_cut_within_an_epoch(caches, tmp_path, at):
    options = replace(OPTIONS, save_every_steps=1)
    with pytest.raises(Killed):
        train(*caches, options=options, out=tmp_path / "run", on_step=killed_at(at))
    train(*caches, options=options, out=tmp_path / "run", resume=True)
    assert train_losses(tmp_path / "run") == pytest.approx(means_over_samples(tmp_path / "run"), rel=1e-12)


def test_a_state_of_a_version_that_added_mean_losses_is_gone_on_with(caches, tmp_path):
    with pytest.raises(Killed):
        train(
            *caches,
            options=replace(OPTIONS, save_every_steps=1),
            out=tmp_path / "run",
            on_step=killed_at(4),
        )
    state = load_state(tmp_path / "run")
    progress = state["progress"]
    progress["epoch_loss"] = progress.pop("epoch_loss_sum") / 4
    progress["epoch_steps"] = 3
    del state["seconds"]
    torch.save(state, tmp_path / "run" / "last.pt")
    assert RunState.of(progress).epoch_loss == pytest.approx(progress["epoch_loss"] / 3)
    train(*caches, options=replace(OPTIONS, save_every_steps=1), out=tmp_path / "run", resume=True)
    assert train_losses(tmp_path / "run") == pytest.approx(means_over_samples(tmp_path / "run"), rel=1e-9)


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(caches, tmp_path):
    options = replace(OPTIONS, save_every_steps=1)
    with pytest.raises(Killed):
        train(*caches, options=options, out=tmp_path / "run", on_step=killed_at(5))
    state = load_state(tmp_path / "run")
    assert 0 < state["seconds"] < 100
    torch.save({**state, "seconds": 1000.0}, tmp_path / "run" / "last.pt")
    result = train(*caches, options=options, out=tmp_path / "run", resume=True)
    assert 1000 < result.seconds < 1100
    again = train(*caches, options=options, out=tmp_path / "run", resume=True)
    assert result.seconds <= again.seconds < 1100


def test_the_seconds_of_a_sweep_and_of_its_runs_are_those_of_all_its_calls(caches, tmp_path):
    runs = expand([{"head": "linear", "seed": [0, 1]}], {"epochs": 2, "batch": 4, "save_every_steps": 1})
    sweep(*caches, runs=runs, out=tmp_path)
    first = read_sweep(tmp_path).seconds
    folder = tmp_path / "runs" / runs[0].name
    (folder / "result.json").unlink()
    torch.save({**load_state(folder), "seconds": 1000.0}, folder / "last.pt")
    result = sweep(*caches, runs=runs, out=tmp_path, resume=True)
    assert result.seconds > first and read_sweep(tmp_path).seconds == result.seconds
    assert 1000 < read_json(folder / "result.json")["seconds"] < 1100
