"""A training or a sweep whose server falls silent stops at a signal, with its state as of the last whole step."""

import os
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from evl_cache import load_head
from evl_cache.batches import FeatureLoader
from evl_cache.errors import WaitEnded
from evl_cache.processes import Interrupted, StopRequests
from evl_cache.runs.directory import load_state
from evl_cache.store import FeatureCache
from evl_cache.sweep.grid import SweepRun
from evl_cache.sweep.stage import sweep
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache
from tests.support.silent_server import silent_server
from tests.support.soon import SOON_S

OPTIONS = TrainOptions(head="decoder2", epochs=2, batch=4, lr=3e-3, seed=5, shuffle_blocks=1)

pytestmark = pytest.mark.usefixtures("one_thread")


def silent_at(folder, side, *, batch):
    """Silence for what is asked of the block that this batch of the first epoch has, and no other."""
    seed = OPTIONS.clip_order_seed if side == "train" else None
    loader = FeatureLoader(
        FeatureCache(folder / side), slice(None), layers=2, batch=4, shuffle_seed=seed, shuffle_blocks=1
    )
    blocks = [int(part.rows[0]) // 4 for part in loader.order.parts(0)]
    shard = re.compile(rf"/{side}/\w+/c[./](\d+)[./]")

    def silence(path):
        found = shard.match(path)
        return "whole" if found and int(found[1]) == blocks[batch] else None

    return silence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    small = {"labels": tuple(i % 3 for i in range(32)), "block_clips": 4}
    write_cache(folder / "train", **small)
    write_cache(folder / "val", prefix="v", split="val", seed=1, **small)
    return folder


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing disturbs."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    caches = [FeatureCache(folder / side) for side in ("train", "val")]
    train(*caches, options=OPTIONS, out=out / "run")
    return out / "run"


def remote(server):
    return [FeatureCache(f"{server.url}/{side}") for side in ("train", "val")]


def told_when_silent(server, number=signal.SIGTERM, *, times=1):
    """Send this process a signal once the server is silent. Returns: when that was, in a list."""
    sent = []

    def tell():
        assert server.is_waited_for.wait(60)
        for _ in range(times):
            time.sleep(0.2)  # so that the main thread waits too, and not only who reads ahead
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)

    threading.Thread(target=tell, daemon=True).start()
    return sent


def same_files(a, b):
    mine, theirs = (load_head(run).state_dict() for run in (a, b))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (a / "steps.jsonl").read_bytes() == (b / "steps.jsonl").read_bytes()


@pytest.mark.timed
@pytest.mark.parametrize(
    ("side", "batch", "steps"),
    [("train", 0, 0), ("train", 5, 5), ("val", 3, 8)],
    ids=["first step", "epoch", "validation"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_stops_while_it_waits(folder, whole, tmp_path, side, batch, steps, number):
    with silent_server(folder, silent_at(folder, side, batch=batch)) as server:
        caches = remote(server)
        sent = told_when_silent(server, number)
        with pytest.raises(
            Interrupted, match=f"stopped after step {steps} of 16, which is kept; .*--resume"
        ) as stopped:
            train(*caches, options=OPTIONS, out=tmp_path / "run")
        assert time.monotonic() - sent[0] < SOON_S
        assert stopped.value.signal_number == number
        assert load_state(tmp_path / "run")["progress"]["step"] == steps
        server.silence = lambda path: None
        train(*remote(server), options=OPTIONS, out=tmp_path / "run", resume=True)
    same_files(tmp_path / "run", whole)


def test_a_second_signal_acts_as_it_did_before(folder, tmp_path, monkeypatch):
    def before(number, frame):
        raise SystemExit(128 + number)

    monkeypatch.setattr(signal, "raise_signal", lambda number: before(number, None))
    stop = StopRequests()
    with stop, pytest.raises(SystemExit, match="143"):
        stop._note(signal.SIGTERM, None)
        assert stop.signal_number == signal.SIGTERM
        stop._note(signal.SIGTERM, None)
    assert stop.signal_number == signal.SIGTERM


def test_a_wait_that_is_ended_without_a_signal_is_told_as_that(folder, tmp_path):
    with silent_server(folder, silent_at(folder, "train", batch=5)) as server:
        caches = remote(server)

        def end():
            assert server.is_waited_for.wait(60)
            while not is_over.wait(0.05):
                caches[0].end_waits()

        is_over = threading.Event()
        threading.Thread(target=end, daemon=True).start()
        try:
            with pytest.raises(WaitEnded, match="no longer waited for"):
                train(*caches, options=OPTIONS, out=tmp_path / "run")
        finally:
            is_over.set()


def sweep_runs():
    return [
        SweepRun(name=head, group=head, options=replace(OPTIONS, head=head))
        for head in ("decoder2", "linear")
    ]


@pytest.mark.timed
@pytest.mark.parametrize(
    ("side", "batch", "steps"), [("train", 5, 5), ("val", 3, 8)], ids=["epoch", "validation"]
)
def test_a_sweep_stops_while_it_waits(folder, whole, tmp_path, side, batch, steps):
    with silent_server(folder, silent_at(folder, side, batch=batch)) as server:
        sent = told_when_silent(server)
        with pytest.raises(
            Interrupted, match=f"stopped after step {steps} of a pass of 2 heads, which is kept"
        ):
            sweep(*remote(server), runs=sweep_runs(), out=tmp_path / "sweep")
        assert time.monotonic() - sent[0] < SOON_S
        server.silence = lambda path: None
        sweep(*remote(server), runs=sweep_runs(), out=tmp_path / "sweep", resume=True)
    same_files(tmp_path / "sweep" / "runs" / "decoder2", whole)
