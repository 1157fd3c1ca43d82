"""Training, validation and sweeps on batches that came through the feed of a device lose what they lose without it."""

import json
from dataclasses import replace

import pytest

import evl_cache.train.loaders as loaders
import evl_cache.train.step_graph as step_graph
from evl_cache.batches import BatchMemory
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.stage import TrainOptions, train
from tests.support.fake_recorder import FakeRecorder
from tests.support.fake_streams import FakeStreams
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=2, batch=4, lr=3e-3, ema=0.9)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def fed(monkeypatch):
    """Has every training get its batches through the feed. Returns: what does so, and its streams."""
    streams = FakeStreams(lazy="copies", host_computes=True)

    def begin():
        monkeypatch.setattr(loaders, "_batch_memory", lambda *args: BatchMemory("cpu:0", streams=streams))
        return streams

    return begin


def epochs(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("clips_per_s", "bottleneck")} for row in rows]


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"keep_in": "ram"}])
def test_a_training(caches, tmp_path, fed, more):
    options = replace(OPTIONS, **more)
    train(*caches, options=options, out=tmp_path / "plain")
    streams = fed()
    train(*caches, options=options, out=tmp_path / "fed")
    assert epochs(tmp_path / "fed") == epochs(tmp_path / "plain")
    assert streams.done["copies"] == 2 * (4 + 2)  # batches of training and of validation


def test_a_sweep(caches, tmp_path, fed):
    runs = expand([{"head": ["decoder1", "linear"], "epochs": [2], "batch": [4]}], {"device": "cpu"})
    sweep(*caches, runs=runs, out=tmp_path / "plain")
    streams = fed()
    sweep(*caches, runs=runs, out=tmp_path / "fed")
    for run in runs:
        assert epochs(tmp_path / "fed/runs" / run.name) == epochs(tmp_path / "plain/runs" / run.name)
    assert streams.done["copies"] == 2 * (4 + 2)


def test_a_recorded_training(caches, tmp_path, fed, monkeypatch):
    """Each place where the feed puts batches has a recording, which reads them there."""
    options = replace(OPTIONS, epochs=4)
    train(*caches, options=options, out=tmp_path / "plain")
    fed()
    events, real, said = [], step_graph.StepGraph, []

    def graph(passes, head, recorder, **more):
        recorder.head, recorder.events = head, events
        return real(passes, head, recorder, **more)

    monkeypatch.setattr(step_graph, "recorder_of", lambda device: FakeRecorder(None))
    monkeypatch.setattr(step_graph, "StepGraph", graph)
    train(*caches, options=options, out=tmp_path / "fed", on_note=said.append)
    assert epochs(tmp_path / "fed") == epochs(tmp_path / "plain") and said == []
    whole = 4 * 3 - step_graph.WARM_UP_STEPS  # the fourth batch of an epoch is smaller
    assert events.count("record") == 2
    assert events.count("replay") == whole and events.count("apart") == 2 + 2 * step_graph.PROOFS
