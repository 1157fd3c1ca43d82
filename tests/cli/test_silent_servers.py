"""Commands and scripts whose server is silent: they say what they wait for, end at a signal, and end by themselves."""

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from evl_cache.processes import StopRequests
from evl_cache.store import FeatureCache
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache
from tests.support.forked_commands import Commands
from tests.support.servers import KEYS
from tests.support.silent_server import silent_server
from tests.support.soon import SOON_S
from tests.support.warm_python import warm_python

TOLD_S = 3.0 + SOON_S  # after the server falls silent
AT_ONCE = 12
PATIENCE = {"EVL_CACHE_SERVER_PATIENCE": "3"}
COMMANDS = {
    "info": "info {url}/train",
    "ls": "ls {url}",
    "pull": "pull {url}/train {out}/pulled",
    "push": "push {local}/train s3://lab/pushed",
    "verify": "verify {url}/train",
    "card": "card {url}/train --print",
    "show": "show c0 --cache {url}/train --run {run} --out {out}/clip.png",
    "eval": "eval --run {run} --cache {url}/val",
    "train": "train --cache {url}/train --val-cache {url}/val --head linear --epochs 1 --out {out}/run",
    "train --dataset": "train --dataset test --head linear --epochs 1 --out {out}/run",
    "sweep": "sweep --cache {url}/train --val-cache {url}/val --head linear,meanpool --epochs 1 --out {out}/sweep",
}

# When the server falls silent: from the first request on, from the middle of its answer, or where features are asked for.
SILENCES = {
    "at once": lambda path: "whole",
    "from mid-body": lambda path: "from mid-body",
    "features": lambda path: "from mid-body" if "/c." in path else None,
}
CASES = [
    (name, when)
    for name in COMMANDS
    for when in SILENCES
    if when != "features" or name in ("pull", "verify", "show", "eval", "train", "train --dataset", "sweep")
]


@dataclass(kw_only=True)
class Ended:
    """How a command ended. `told`: what it said of its wait. `took_s`: since the signal, or since it began."""

    status: int
    told: list[str]
    errors: list[str]
    took_s: float
    told_after_s: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("silent")
    caches = write_cache(folder / "train"), write_cache(folder / "val", prefix="v", split="val", seed=1)
    torch.set_num_threads(1)
    train(*caches, options=TrainOptions(head="linear", epochs=1, batch=8), out=folder / "run")
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    started = Commands(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


class Runs:
    """Commands that run at the same time, each against a server of its own."""

    def __init__(self, folder, out, commands):
        self._folder, self._out, self._commands = folder, out, commands
        self._asking, self._ending = (
            threading.Lock(),
            threading.Lock(),
        )  # one command ends at a time: each has 2 s

    def all(self, numbers):
        cases = [(*case, number) for case in CASES for number in numbers]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return dict(zip(cases, threads.map(self._one, cases), strict=True))

    def _one(self, case):
        name, when, number = case
        out = self._out / "-".join(map(str, case)).replace(" ", "")
        out.mkdir()
        with silent_server(self._folder, SILENCES[when]) as server:
            words = [
                word.format(url=server.url, local=self._folder, run=self._folder / "run", out=out)
                for word in COMMANDS[name].split()
            ]
            # A listing is no file: of data sets that are looked for, the cache itself is named.
            environment = {
                "EVL_CACHE_COPY_ROOT": str(out / "copies"),
                "EVL_CACHE_ROOT": f"{server.url}/train:{server.url}/val",
                "AWS_ENDPOINT_URL": server.url,
                **KEYS,
                **({} if number else PATIENCE),
            }
            with self._asking:
                pid = self._commands.start(*words, **environment)
            errors = self._commands.output_of(pid).with_suffix(".err")
            assert server.is_waited_for.wait(60), case
            since, told_after = time.monotonic(), 0.0
            if number:
                wait_until(lambda: "waiting for" in errors.read_text(), TOLD_S + 10, errors)
                told_after = time.monotonic() - since
            with self._ending if number else nullcontext():
                if number:
                    since = time.monotonic()
                    os.kill(pid, number)
                wait_until(lambda: has_ended(pid), 30, errors)
                took = time.monotonic() - since
            with self._asking:
                ended = self._commands.wait(pid)
        lines = [line for line in ended.stderr.splitlines() if line]
        return Ended(
            status=ended.status,
            told=[line for line in lines if line.startswith("waiting for")],
            errors=[line for line in lines if not line.startswith("waiting for")],
            took_s=took,
            told_after_s=told_after,
        )


def wait_until(is_so, within_s, errors):
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, errors.read_text()
        time.sleep(0.02)


def has_ended(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.timed
def test_commands_say_what_they_wait_for_and_end_at_a_signal(folder, tmp_path, commands):
    for case, ended in Runs(folder, tmp_path, commands).all([signal.SIGTERM, signal.SIGINT]).items():
        name, when, number = case
        assert ended.status == 128 + number, (case, ended)
        assert ended.took_s < SOON_S and ended.told_after_s < TOLD_S, (case, ended)
        place = "s3://lab/pushed/" if name == "push" else "http://127.0.0.1:"
        assert ended.told[0].startswith(f"waiting for {place}") and ended.told[0].endswith(" s more"), (
            case,
            ended,
        )
        errors = [line for line in ended.errors if line.startswith("error: ")]
        assert len(errors) <= 1 and not any("Traceback" in line for line in ended.errors), (case, ended)
        if when == "features" and name.startswith("train"):
            assert "stopped after step 0 of 1, which is kept; go on with --out" in errors[0], (case, ended)


@pytest.mark.timed
def test_commands_end_by_themselves_where_patience_does(folder, tmp_path, commands):
    for case, ended in Runs(folder, tmp_path, commands).all([0]).items():
        # Which caches there are is not known then: no pair is found.
        is_pair_unknown = case[0] == "train --dataset" and case[1] != "features"
        assert ended.status == (2 if is_pair_unknown else 1), (case, ended)
        assert ended.took_s < 3 + 3 + SOON_S, (case, ended)
        errors = [line for line in ended.errors if line.startswith(("error: ", "not seen: "))]
        assert len(errors) == 1 and not any("Traceback" in line for line in ended.errors), (case, ended)


@pytest.mark.timed
@pytest.mark.parametrize("seed", [0])
def test_a_training_that_is_stopped_at_random_moments_ends_as_one_that_is_not(
    folder, tmp_path, commands, seed
):
    """Its server falls silent at random too, now before an answer and now in its middle."""
    drawn, settings = (
        random.Random(seed),
        "--head linear --epochs 4 --batch 4 --shuffle-blocks 1 --save-every-steps 1",
    )

    def silence(path):
        return drawn.choice([None, None, None, "whole", "from mid-body"])

    def begin(server, out):
        words = (
            f"train --cache {server.url}/train --val-cache {server.url}/val {settings} --out {out}".split()
        )
        resumes = ["--resume"] if (out / "last.pt").exists() else []
        return commands.start(*words, *resumes, EVL_CACHE_COPY_ROOT=str(tmp_path / "copies"))

    with silent_server(folder, silence) as server:
        for _ in range(5):
            pid = begin(server, tmp_path / "cut")
            errors = commands.output_of(pid).with_suffix(".err")
            time.sleep(drawn.uniform(0.0, 1.5))
            since = time.monotonic()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda pid=pid: has_ended(pid), 30, errors)
            took, ended = time.monotonic() - since, commands.wait(pid)
            # Before the command has begun a signal acts as it does on any process.
            assert took < SOON_S and ended.status in (143, -signal.SIGTERM, 0), ended
            assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") <= 1, ended
        server.silence = lambda path: None
        assert commands.wait(begin(server, tmp_path / "cut")).status == 0
        assert commands.wait(begin(server, tmp_path / "whole")).status == 0
    for name in ("head.safetensors", "steps.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


OPENED = """
import os, signal, sys, threading, time
from evl_cache.batches import FeatureLoader
from evl_cache.store import FeatureCache

loader = FeatureLoader(FeatureCache(sys.argv[1]), slice(None), batch=2, layers=2)
batches = loader.epoch()
"""
# What a script does while its server is silent where features are asked for, and what it then says.
SCRIPTS = {
    "is interrupted": ("print('waits', flush=True); next(batches)", "KeyboardInterrupt"),
    "fails otherwise": (
        """
threading.Thread(target=lambda: next(batches), daemon=True).start()
time.sleep(0.5)
print('waits', flush=True)
raise ValueError('unrelated')
""",
        "unrelated",
    ),
    "fails while it fetches ahead": (
        """
loader.cache.prefetch(loader.cache.buffers(slots=1, reads=loader.reads), range(10), [2])
time.sleep(0.5)
print('waits', flush=True)
raise ValueError('unrelated')
""",
        "unrelated",
    ),
    "leaves the epoch": (
        """
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
print('waits', flush=True)
try:
    next(batches)
except KeyboardInterrupt:
    sys.exit('goes on')
""",
        "goes on",
    ),
}


@pytest.mark.timed
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_while_threads_wait(folder, tmp_path, name):
    does, says = SCRIPTS[name]
    with silent_server(folder, SILENCES["features"]) as server:
        child = subprocess.Popen(
            [warm_python(), "-c", OPENED + does, f"{server.url}/train"],
            env=os.environ | {"EVL_CACHE_COPY_ROOT": str(tmp_path / "copies")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout.readline() == "waits\n"
            assert server.is_waited_for.wait(60)
            since = time.monotonic()
            if name == "is interrupted":
                time.sleep(0.2)  # so that the main thread waits too
                child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    assert time.monotonic() - since < SOON_S + 0.5, errors
    assert child.returncode == 1 and says in errors, errors


@pytest.mark.timed
def test_a_forked_child_ends_at_a_signal(folder, tmp_path, monkeypatch):
    """One that reads a cache which its parent opened, beside a training that notes signals."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    with silent_server(folder, SILENCES["features"]) as server:
        cache = FeatureCache(f"{server.url}/train")
        with StopRequests():
            child = multiprocessing.get_context("fork").Process(target=cache.read, args=([0],))
            child.start()
            try:
                assert server.is_waited_for.wait(60)
                since = time.monotonic()
                child.terminate()
                child.join(60)
            finally:
                child.kill()
                signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - since < SOON_S and child.exitcode == -signal.SIGTERM
