"""Processes that train together stop at the same step while the server of one of them is silent, whoever gets the signal."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.feature_caches import write_cache
from tests.support.servers import free_port
from tests.support.silent_server import silent_server
from tests.support.soon import SOON_S
from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
WAITING, OTHER = 0, 1  # ranks: whose server falls silent, and who waits for that process
WORKER = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from evl_cache.errors import EvlCacheError
from evl_cache.processes import Interrupted, processes_of_environment
from evl_cache.store import FeatureCache
from evl_cache.train import TrainOptions, train

jobs, folder, rank = json.loads(sys.argv[1]), Path(sys.argv[2]), os.environ["RANK"]
os.environ["EVL_CACHE_COPY_ROOT"] = str(folder / f"copies-{rank}")
with processes_of_environment(timeout_s=60) as processes:
    for number, job in enumerate(jobs):
        caches = [FeatureCache(f"{job['urls'][int(rank)]}/{side}") for side in ("train", "val")]
        (folder / f"begins-{number}-{rank}").touch()
        try:
            train(*caches, options=TrainOptions(**job["options"]), out=job["out"], processes=processes,
                  resume=job["resume"])
            report = "done"
        except (EvlCacheError, Interrupted) as error:
            report = f"{type(error).__name__}: {error}"
        (folder / f"tmp-{number}-{rank}").write_text(report)
        (folder / f"tmp-{number}-{rank}").rename(folder / f"report-{number}-{rank}")
"""
OPTIONS = {"head": "linear", "epochs": 2, "batch": 4, "lr": 3e-3, "seed": 5, "shuffle_blocks": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    small = {"labels": tuple(i % 3 for i in range(32)), "block_clips": 4}
    write_cache(folder / "train", **small)
    write_cache(folder / "val", prefix="v", split="val", seed=1, **small)
    return folder


class Processes:
    """Two that train, job after job."""

    def __init__(self, jobs, folder):
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": "2",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.folder = folder
        self.children = [
            subprocess.Popen(
                [warm_python(), "-c", WORKER, json.dumps(jobs), str(folder)],
                env=os.environ | common | {"RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def reports(self, number, *, within_s):
        """What both say of a job."""
        paths = [self.folder / f"report-{number}-{rank}" for rank in range(2)]
        deadline = time.monotonic() + within_s
        while not all(path.exists() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [path.read_text() if path.exists() else "still waits" for path in paths]


@pytest.mark.timed
@pytest.mark.parametrize("where", ["first step", "epoch", "validation"])
def test_processes_stop_together(folder, tmp_path, where):
    """Each of three jobs: the one that waits gets a signal, or the other one, or both. The state goes on to the same bytes."""
    from tests.train.test_stopping import silent_at

    side, batch, steps = {
        "first step": ("train", 0, 0),
        "epoch": ("train", 5, 5),
        "validation": ("val", 3, 8),
    }[where]
    silence = silent_at(folder, side, batch=batch)
    told = [(WAITING,), (OTHER,), (WAITING, OTHER)]
    with silent_server(folder, silence) as silent, silent_server(folder, lambda path: None) as sound:
        urls = [silent.url, sound.url]

        def job(name, resume=False):
            return {"urls": urls, "options": OPTIONS, "out": str(tmp_path / name), "resume": resume}

        jobs = [*(job(f"cut-{number}") for number in range(3)), job("cut-1", True), job("whole")]
        processes = Processes(jobs, tmp_path)
        try:
            for number, ranks in enumerate(told):
                assert silent.is_waited_for.wait(60)
                time.sleep(0.5)  # so that the other one waits for it
                silent.is_waited_for.clear()
                if number + 1 == len(told):
                    silent.silence = lambda path: None
                sent = time.monotonic()
                for rank in ranks:
                    processes.children[rank].send_signal(signal.SIGTERM)
                reports = processes.reports(number, within_s=30)
                assert time.monotonic() - sent < SOON_S, reports
                assert (
                    reports == [reports[0]] * 2
                    and f"Interrupted: stopped after step {steps} of 16" in reports[0]
                )
            assert processes.reports(3, within_s=60) == processes.reports(4, within_s=60) == ["done", "done"]
            errors = [child.communicate(timeout=60)[1] for child in processes.children]
        finally:
            for child in processes.children:
                child.kill()
    assert not any("Traceback" in text for text in errors), errors
    a, b = (tmp_path / name for name in ("cut-1", "whole"))
    for name in ("head.safetensors", "steps.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_a_process_that_is_lost_while_it_waits_is_told_at_once(folder, tmp_path):
    from tests.train.test_stopping import silent_at

    with silent_server(folder, silent_at(folder, "train", batch=5)) as silent:
        job = {"urls": [silent.url] * 2, "options": OPTIONS, "out": str(tmp_path / "run"), "resume": False}
        with silent_server(folder, lambda path: None) as sound:
            job["urls"][OTHER] = sound.url
            processes = Processes([job], tmp_path)
            try:
                assert silent.is_waited_for.wait(60)
                time.sleep(0.5)  # so that the other one waits for it
                processes.children[WAITING].kill()
                report = tmp_path / f"report-0-{OTHER}"
                deadline = time.monotonic() + 30
                while not report.exists() and time.monotonic() < deadline:
                    time.sleep(0.02)
            finally:
                for child in processes.children:
                    child.kill()
                    child.communicate()
    assert "EvlCacheError: process 1 of 2 lost another one while waiting for a batch" in report.read_text()


def test_a_server_that_stays_silent_for_one_process_ends_all(folder, tmp_path, monkeypatch):
    from tests.train.test_stopping import silent_at

    monkeypatch.setenv("EVL_CACHE_SERVER_PATIENCE", "5")
    with (
        silent_server(folder, silent_at(folder, "train", batch=5)) as silent,
        silent_server(folder, lambda path: None) as sound,
    ):
        job = {"options": OPTIONS, "out": str(tmp_path / "run"), "resume": False}
        processes = Processes([{**job, "urls": [silent.url, sound.url]}], tmp_path)
        try:
            waiting, other = processes.reports(0, within_s=60)
        finally:
            for child in processes.children:
                child.kill()
                child.communicate()
    assert waiting.startswith("Unreachable: ") and silent.url in waiting
    assert other == "ToldElsewhere: another process failed while waiting for a batch"
