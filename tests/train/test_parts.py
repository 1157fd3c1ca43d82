"""A batch that is split into passes is on the device part by part: in training, in validation, and in a sweep."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import evl_cache.runs.scoring as scoring
import evl_cache.sweep.memory as sweep_memory
import evl_cache.sweep.shared_pass as shared_pass
from evl_cache.batches import RING
from evl_cache.heads import Dropout
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.sweep.memory import HeadMemory, plan_passes
from evl_cache.sweep.shared_pass import PlannedRun
from evl_cache.train.head_reads import training_reads
from evl_cache.train.memory import Loads
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_pair

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = TrainOptions(head="decoder2", epochs=2, batch=8, lr=3e-3)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"), layers=(1, 2, 3, 4))


@pytest.fixture
def scored(monkeypatch):
    """How many samples each forward pass of a validation has."""
    sizes = []
    real = scoring.ViewSums.add_batch

    def add_batch(self, head, batch, features, *args, part=slice(None), **more):
        sizes.append(len(batch.labels[part]))
        first = features.tokens[0]
        codes = getattr(first, "codes", None)
        assert len(first.values if codes is None else codes) == sizes[-1]
        real(self, head, batch, features, *args, part=part, **more)

    monkeypatch.setattr(scoring.ViewSums, "add_batch", add_batch)
    return sizes


def epochs(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_validation_takes_the_passes_of_training(caches, tmp_path, scored, accumulate):
    train(*caches, options=replace(OPTIONS, accumulate=accumulate), out=tmp_path / "run")
    assert max(scored) == min(5, 8 // accumulate) and sum(scored) == 2 * 5


def test_a_sweep_validates_in_the_passes_of_training(caches, tmp_path, scored):
    runs = expand([{"head": "decoder2"}], {"epochs": 1, "batch": 8, "accumulate": 4})
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    assert scored == [2, 2, 1]


def test_validation_in_parts_scores_what_whole_batches_score(caches, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    options = replace(OPTIONS, dropout=0.0)
    results = [
        train(*caches, options=options, out=whole),
        train(*caches, options=replace(options, accumulate=4), out=split),
    ]
    assert results[0].top1 == results[1].top1
    for a, b in zip(epochs(whole), epochs(split), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)


def test_a_sweep_has_one_part_decoded_at_a_time(caches, tmp_path, monkeypatch):
    living: weakref.WeakSet = weakref.WeakSet()
    seen = []

    class Watched(shared_pass.SharedBatch):
        def __init__(self, features, *args, **more):
            super().__init__(features, *args, **more)
            living.add(self)
            seen.append((len(living), len(self._tokens[0].values)))

    monkeypatch.setattr(shared_pass, "SharedBatch", Watched)
    runs = expand([{"head": ["decoder2", "linear"]}], {"epochs": 1, "batch": 8, "accumulate": 4})
    gc.disable()
    try:
        sweep(*caches, runs=runs, out=tmp_path / "sweep")
    finally:
        gc.enable()
    # 13 samples to train on, 5 to validate on.
    assert seen == [(1, size) for size in (2, 2, 2, 2, 2, 2, 1, 2, 2, 1)]


@pytest.mark.parametrize("dropout", [Dropout, nn.Dropout])
@pytest.mark.parametrize("head", ["decoder2", "attentive"])
def test_a_head_of_a_sweep_draws_the_dropout_of_its_own_training_in_every_part(
    caches, tmp_path, monkeypatch, head, dropout
):
    for module in ("attentive", "linear", "decoder.plain", "decoder.decoder_layer"):
        monkeypatch.setattr(f"evl_cache.heads.{module}.Dropout", dropout)
    grid = {"head": [head, "linear"], "seed": [0, 1]}
    runs = expand([grid], {"epochs": 2, "batch": 8, "accumulate": 4, "lr": 3e-3, "dropout": 0.5})
    sweep(*caches, runs=runs, out=tmp_path / "sweep")
    for run in runs:
        train(*caches, options=run.options, out=tmp_path / run.name)
        found, own = epochs(tmp_path / "sweep" / "runs" / run.name), epochs(tmp_path / run.name)
        for a, b in zip(found, own, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


def test_a_sweep_that_accumulates_trains_as_one_that_does_not(caches, tmp_path):
    found = []
    for accumulate in (1, 4):
        grid = {"epochs": 2, "batch": 8, "accumulate": accumulate, "lr": 3e-3, "dropout": 0.5}
        runs = expand([{"head": ["decoder2", "linear"]}], grid)
        sweep(*caches, runs=runs, out=tmp_path / str(accumulate))
        rows = [row for run in runs for row in epochs(tmp_path / str(accumulate) / "runs" / run.name)]
        found.append([value for row in rows for value in (row["train_loss"], row["val_loss"])])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_sweep_counts_whole_batches_of_loaders_and_one_part_that_is_decoded(
    caches, monkeypatch, accumulate
):
    counted = []

    def split_passes(runs, memory, *, room, shared):
        counted.append(shared)
        return [list(runs)]

    monkeypatch.setattr(sweep_memory, "split_passes", split_passes)
    monkeypatch.setattr(sweep_memory, "head_memory", lambda *a, **k: HeadMemory(state=0, step=0))
    runs = expand([{"head": "decoder2"}], {"epochs": 1, "batch": 8, "accumulate": accumulate})
    reads = training_reads(runs[0].options, caches[0].spec)
    samples = torch.arange(13).numpy(), torch.arange(5).numpy()
    planned = [PlannedRun(run=run, reads=reads, sample_nbytes=0) for run in runs]
    plan_passes(planned, caches, samples, memory_bytes=None, on_note=print)
    sample = Loads.of(caches, samples, reads).sample_nbytes
    tokens, maps = 2 * 3 * 5 * 16, 2 * 2 * 2 * 4 * 4  # values of two layers
    decoded = 4 * (2 * tokens + maps)
    assert counted == [8 // accumulate * decoded + RING * 8 * sample]
