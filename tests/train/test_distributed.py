"""Two or four processes train as one does: the same steps, one run directory, a clear end when one is lost."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache import load_head
from evl_cache.batches.epoch_order import EpochOrder
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.runs.directory import load_state
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import VIEWS, write_cache
from tests.support.servers import free_port
from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
# 13 samples in batches of 4: the last batch is one sample, of which one of two processes has no part
OPTIONS = {
    "head": "decoder2",
    "epochs": 3,
    "batch": 4,
    "lr": 3e-3,
    "dropout": 0.5,
    "ema": 0.9,
    "accumulate": 2,
}
WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from evl_cache.processes.group import processes_of_environment
from evl_cache.errors import EvlCacheError
from evl_cache.processes import Interrupted
from evl_cache.store import FeatureCache
from evl_cache.train import step_loss
from evl_cache.train.stage import TrainOptions, train

def run(job, processes):
    losses = []

    def on_step(done, total, loss):
        losses.append(loss)
        if [done, processes.place.rank] == job.get("dies"):
            os._exit(9)
        if [done, processes.place.rank] == job.get("stops"):
            signal.raise_signal(signal.SIGTERM)

    step_loss.is_read_late = lambda device: job.get("late", False)
    options = TrainOptions(**job["options"])
    result = train(*caches, options=options, out=Path(job["out"]), resume=job.get("resume", False),
                   on_step=on_step, processes=processes)
    return {"losses": losses, "top1": result.top1, "val_clips": result.val_clips}

caches = [FeatureCache(path) for path in json.loads(sys.argv[1])]
with processes_of_environment(timeout_s=60) as processes:
    for number, job in enumerate(json.loads(sys.argv[2])):
        try:
            report = run(job, processes)
        except (EvlCacheError, Interrupted) as error:
            report = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[3], f"report-{number}-{processes.place.rank}").write_text(json.dumps(report))
        if "lost another one" in report.get("error", ""):
            os._exit(1)
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    val = write_cache(folder / "val", labels=(0, 1, 2), prefix="v", split="val", seed=1)
    return write_cache(folder / "train"), val


def start(world, caches, jobs, folder):
    """Have `world` processes do jobs one after the other. Returns: exit codes; reports by job, then rank."""
    folder.mkdir()
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "PYTHONPATH": str(ROOT),
    }
    paths = json.dumps([str(cache.path) for cache in caches])
    children = [
        subprocess.Popen(
            [warm_python(), "-c", WORKER, paths, json.dumps(jobs), str(folder)],
            env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert not any("Traceback" in text for text in errors), errors
    reports = [[folder / f"report-{number}-{rank}" for rank in range(world)] for number in range(len(jobs))]
    return [child.returncode for child in children], [
        [json.loads(path.read_text()) if path.exists() else {} for path in row] for row in reports
    ]


def single(caches, out, **more):
    torch.set_num_threads(1)
    losses = []
    options = TrainOptions(**{**OPTIONS, **more})
    result = train(*caches, options=options, out=out, on_step=lambda done, total, loss: losses.append(loss))
    return result, losses


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_same_weights(a, b):
    a, b = (load_head(path).state_dict() for path in (a, b))
    for name in a:
        if not name.endswith("k_proj.bias"):  # its gradient is rounding: exactly zero in theory
            torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0, msg=name)


def check_same_gradients(a, b):
    """AdamW hardly minds gradients of another scale; its means tell."""
    means = [load_state(path)["optimizer"]["state"] for path in (a, b)]
    largest = 0.0
    for number, state in means[0].items():
        torch.testing.assert_close(means[1][number]["exp_avg"], state["exp_avg"], atol=1e-4, rtol=1e-2)
        largest = max(largest, float(state["exp_avg"].abs().max()))
    assert largest > 1e-2


@pytest.fixture(scope="module")
def runs(caches, tmp_path_factory):
    """One process; two and four; two in a directory that holds a run; two that keep samples; some that die; going on."""
    folder = tmp_path_factory.mktemp("runs")
    result, losses = single(caches, folder / "one")

    def saving(name, **more):
        return {"options": {**OPTIONS, "save_every_steps": 1}, "out": str(folder / name), **more}

    jobs = [
        {"options": OPTIONS, "out": str(folder / "two")},
        {"options": OPTIONS, "out": str(folder / "one")},
        {"options": OPTIONS, "out": str(folder / "late"), "late": True},
        {"options": OPTIONS, "out": str(folder / "stopped"), "late": True, "stops": [6, 1]},
        {"options": {**OPTIONS, "lr": 1e12}, "out": str(folder / "diverged"), "late": True},
        {"options": {**OPTIONS, "keep_in": "ram"}, "out": str(folder / "kept")},
        saving("lost", dies=[6, 1]),
    ]
    codes, reports = start(2, caches, jobs, folder / "reports")
    shutil.copytree(folder / "lost", folder / "lost-two")
    jobs = [
        {"options": OPTIONS, "out": str(folder / "four")},
        saving("lost-two", resume=True),
        saving("lost-four", dies=[6, 3]),
    ]
    codes_of_four, reports_of_four = start(4, caches, jobs, folder / "reports-of-four")
    jobs = [saving("lost", resume=True), saving("lost-four", resume=True), saving("stopped", resume=True)]
    _, ((two_to_one,), (four_to_one,), (stopped_to_one,)) = start(1, caches, jobs, folder / "more")
    return {
        "folder": folder,
        "one": {"losses": losses, "top1": result.top1, "val_clips": result.val_clips},
        "codes": codes,
        "codes_of_four": codes_of_four,
        **dict(zip(("two", "refused", "late", "stopped", "diverged", "kept", "lost"), reports, strict=True)),
        **dict(zip(("four", "two to four", "lost of four"), reports_of_four, strict=True)),
        "two to one": [two_to_one],
        "four to one": [four_to_one],
        "stopped to one": [stopped_to_one],
    }


@pytest.mark.parametrize("processes", ["two", "four"])
def test_several_processes_take_the_steps_of_one(runs, processes):
    assert len(runs[processes]) == {"two": 2, "four": 4}[processes]
    for report in runs[processes]:
        assert report["losses"] == pytest.approx(runs["one"]["losses"], abs=1e-5)
        assert (report["top1"], report["val_clips"]) == (runs["one"]["top1"], 3)
    one, several = runs["folder"] / "one", runs["folder"] / processes
    check_same_weights(one, several)
    check_same_gradients(one, several)
    steps = [row["loss"] for row in lines(several / "steps.jsonl")]
    assert steps == runs[processes][0]["losses"] and len(steps) == 12
    for mine, theirs in zip(lines(one / "metrics.jsonl"), lines(several / "metrics.jsonl"), strict=True):
        assert theirs["val_loss"] == pytest.approx(mine["val_loss"], abs=1e-5)
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], abs=1e-5)


def test_processes_that_read_losses_late_take_the_same_steps(runs):
    for late, at_once in zip(runs["late"], runs["two"], strict=True):
        assert late == at_once
    mine, theirs = (lines(runs["folder"] / name / "steps.jsonl") for name in ("late", "two"))
    assert mine == theirs


def test_a_signal_to_one_process_stops_all_after_the_same_step(runs):
    messages = {report["error"] for report in runs["stopped"]}
    assert len(messages) == 1 and "Interrupted: stopped after step 8 of 12" in messages.pop()
    (rest,) = runs["stopped to one"]
    assert rest["losses"] == pytest.approx(runs["one"]["losses"][8:], abs=1e-5)
    check_same_weights(runs["folder"] / "one", runs["folder"] / "stopped")


def test_a_divergence_read_late_ends_all_processes_alike(runs):
    messages = {report["error"] for report in runs["diverged"]}
    assert len(messages) == 1 and "training diverged" in messages.pop()


def test_processes_that_share_the_samples_they_keep_take_the_same_steps(runs):
    for report in runs["kept"]:
        assert report["losses"] == pytest.approx(runs["one"]["losses"], abs=1e-5)
        assert (report["top1"], report["val_clips"]) == (runs["one"]["top1"], 3)


def test_an_error_of_the_first_process_ends_all_and_is_told_once(runs):
    first, second = (report["error"] for report in runs["refused"])
    assert first.startswith("UsageError") and "holds a run already" in first
    assert second.startswith("ToldElsewhere")


def test_a_lost_process_ends_the_run_in_one_line(runs):
    assert runs["codes"] == [1, 9]
    assert runs["codes_of_four"] == [1, 1, 1, 9]
    for job, count in (("lost", 2), ("lost of four", 4)):
        message = runs[job][0]["error"]
        assert message.startswith(f"EvlCacheError: process 0 of {count} lost another one at step 7")
        assert "--resume" in message and "\n" not in message


@pytest.mark.parametrize(
    ("job", "out"), [("two to one", "lost"), ("two to four", "lost-two"), ("four to one", "lost-four")]
)
def test_another_number_of_processes_goes_on_after_a_kill_with_the_same_losses(runs, job, out):
    for report in runs[job]:
        assert len(report["losses"]) == 6  # the first process kept its sixth step
        assert report["losses"] == pytest.approx(runs["one"]["losses"][-6:], abs=1e-5)
    check_same_weights(runs["folder"] / "one", runs["folder"] / out)


def test_torchrun_starts_the_command(caches, tmp_path):
    run = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [
        "-m",
        "evl_cache_cli",
        "train",
        "--cache",
        str(caches[0].path),
        "--val-cache",
        str(caches[1].path),
    ]
    options = ["--head", "decoder1", "--epochs", "1", "--device", "cpu", "--json"]
    done = subprocess.run(
        [*run, *args, *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHON_EXEC": warm_python(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val_clips"] == 3  # told once
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["train-decoder1-1"]


# Who has which samples


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffle_blocks", [0, 2])
def test_parts_of_a_batch_are_the_batch_of_one_process(world, shuffle_blocks):
    def orders(rank, world):
        return EpochOrder(
            samples=np.arange(0, 46, 2),
            batch=8,
            seed=4,
            block_samples=6,
            shuffle_blocks=shuffle_blocks,
            rank=rank,
            world=world,
        )

    for epoch in range(3):
        whole = list(orders(0, 1).parts(epoch))
        split = [list(orders(rank, world).parts(epoch)) for rank in range(world)]
        assert {len(parts) for parts in split} == {len(whole)} == {3}
        assert np.array_equal(np.sort(np.concatenate([p.rows for p in whole])), np.arange(0, 46, 2))
        for number, batch in enumerate(whole):
            parts = [parts[number] for parts in split]
            assert {(part.number, part.total) for part in parts} == {(number, len(batch.rows))}
            rows = [part.rows for part in parts if not part.is_stand_in]
            assert np.array_equal(np.concatenate(rows), batch.rows)
            assert all(len(part.rows) == 1 for part in parts if part.is_stand_in)
        assert [part.number for part in orders(0, world).parts(epoch, start_batch=2)] == [2]


def test_two_loaders_serve_what_one_does(tmp_path):
    cache = write_cache(tmp_path / "cache", views=VIEWS, failed=(3,))
    one = FeatureLoader(cache, range(13), layers=(4,), batch=5, shuffle_seed=1)
    two = [
        FeatureLoader(cache, range(13), layers=(4,), batch=5, shuffle_seed=1, rank=rank, world=2)
        for rank in range(2)
    ]
    assert [len(loader) for loader in (one, *two)] == [3, 3, 3]
    for whole, *parts in zip(one.epoch(1), *(loader.epoch(1) for loader in two), strict=True):
        expected = whole.features.dequantized()[0][0]
        found = torch.cat([part.features.dequantized()[0][0] for part in parts if not part.is_stand_in])
        assert torch.equal(found, expected)
        assert torch.equal(torch.cat([part.labels for part in parts if not part.is_stand_in]), whole.labels)
