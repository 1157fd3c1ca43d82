"""Commands against servers that misbehave by seed: started, watched, and judged by how they end."""

import json
import os
import random
import re
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.bad_answers import FAULTS, names_a_cause
from tests.support.bad_server_jobs import ERRORS, VALIDATED
from tests.support.bad_servers import NOTHING_WRONG, BadServer, misbehaving_server
from tests.support.credentials import PASSWORD, USER, write_secret
from tests.support.forked_commands import Commands, Ended
from tests.support.soon import SOON_S
from tests.support.store_helpers import differences, tree

PATIENCE_S = 2.0  # EVL_CACHE_SERVER_PATIENCE of the commands
SLACK_S = 8.0  # of a computer that does other things: to start, compute, write
# What a fault that passes costs a client beside its own answer, at most.
_COST_S = {"429 with Retry-After": 1.0, "503 with a date": 2.0, "restart": 1.0, "delay": 0.2}
_JUST_THEN_S = 0.7  # after the signal: it was ending by itself when it came
_AT_ONCE = 4
_LATE = "ends late"


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What is served: caches `a` and `v` below `root`, and the results of undisturbed work on the disk."""

    root: Path
    features: str  # `epochs_digest` of `a`
    head: bytes
    s3: str = ""  # URL of a server that has them in a bucket `lab`


@dataclass(kw_only=True)
class Run:
    """One command and its server."""

    seed: int
    kind: str
    folder: Path
    server: BadServer
    url: str
    pid: int
    begun_at: float
    signal_after_s: float | None = None  # behind its first request, it is asked to end
    signal_at: float | None = None
    ended: Ended | None = None
    took_s: float = 0.0
    signalled_at: float | None = None
    number: int = signal.SIGTERM
    was_whole: bool = False  # nothing but writing was left when the signal came


def words(kind: str, url: str, folder: Path) -> list[str]:
    """The command of a kind of run."""
    if kind == "train":
        train = "--head decoder2 --epochs 1 --batch 4 --shuffle-blocks 0 --seed 3 --device cpu".split()
        places = ["--cache", f"{url}/a", "--val-cache", f"{url}/v", "--out", str(folder / "run")]
        return ["epochs", f"{url}/a", "train", *places, *train]
    if kind == "s3":
        return ["pull", "s3://lab/a", str(folder / "pulled")]
    return ["pull", f"{url}/a", str(folder / "pulled"), "--threads", "4"]


class Schedules:
    """Runs seeds, some at a time."""

    def __init__(self, commands: Commands, sources: Sources, folder: Path) -> None:
        self._commands, self._sources, self._folder = commands, sources, folder
        self._keys: dict[str, str] = {}

    def run(
        self, kind: str, seeds: list[int], *, signals: bool = False, keys: dict[str, str] | None = None
    ) -> list[str]:
        """What is wrong with how these seeds end, each line with its seed.

        Args:
            signals: ask each to end at a random moment.
            keys: of S3.
        """
        self._keys = keys or {}
        wrong = self._run(kind, seeds, signals, _AT_ONCE)
        # On a busy computer several at a time may be slow for no fault of theirs.
        late = sorted({seed for seed, fault in wrong if _LATE in fault})
        wrong = [(seed, fault) for seed, fault in wrong if _LATE not in fault]
        self._folder = self._folder / "alone"
        wrong += self._run(kind, late, signals, 1)
        return [f"seed {seed} of {kind}: {fault}" for seed, fault in wrong]

    def _run(self, kind: str, seeds: list[int], signals: bool, at_once: int) -> list[tuple[int, str]]:
        waiting, wrong = list(seeds), []
        running: list[tuple[Run, ExitStack]] = []
        with ExitStack() as servers:
            elsewhere = servers.enter_context(misbehaving_server(self._sources.root, NOTHING_WRONG))
            while waiting or running:
                while waiting and len(running) < at_once:
                    stack = servers.enter_context(ExitStack())
                    run = self._start(kind, waiting.pop(0), stack, elsewhere.url, signals=signals)
                    running.append((run, stack))
                time.sleep(0.01)
                for run, stack in list(running):
                    if not self._has_ended(run):
                        continue
                    running.remove((run, stack))
                    wrong += [(run.seed, fault) for fault in self._faults_of(run)]
                    stack.close()
        return wrong

    def _start(self, kind: str, seed: int, stack: ExitStack, elsewhere: str, *, signals: bool) -> Run:
        folder = self._folder / f"{kind}-{seed}"
        folder.mkdir(parents=True)
        is_s3 = kind == "s3"
        login = (USER, PASSWORD) if seed % 4 >= 2 and not is_s3 else None
        root = self._sources.s3 if is_s3 else self._sources.root
        given = (self._keys["AWS_ACCESS_KEY_ID"],) if is_s3 else ()
        server = stack.enter_context(
            misbehaving_server(root, seed, login=login, given=given, elsewhere=elsewhere)
        )
        in_url = login is not None and seed % 8 >= 6
        url = server.url.replace("://", f"://{USER}:{PASSWORD}@") if in_url else server.url
        entry = f"machine 127.0.0.1 login {USER} password {PASSWORD}\n" if login and not in_url else ""
        write_secret(folder / "netrc", entry)
        pid = self._commands.start(*words(kind, url, folder), **self._environment(folder, server))
        rng = random.Random(f"signal {kind} {seed}")
        now = time.monotonic()
        run = Run(seed=seed, kind=kind, folder=folder, server=server, url=url, pid=pid, begun_at=now)
        run.number = rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
        if signals and server.schedule is not None:
            run.signal_after_s = rng.uniform(0.0, 1.2)
            server.schedule = replace(server.schedule, pause_s=0.06)  # so that it is at work still
        return run

    def _environment(self, folder: Path, server: BadServer) -> dict[str, str]:
        return {
            "EVL_CACHE_SERVER_PATIENCE": str(PATIENCE_S),
            "EVL_CACHE_COPY_ROOT": str(folder / "copies"),
            "EVL_CACHE_COPY_GB": "1",
            "NETRC": str(folder / "netrc"),
            **self._keys,
            "AWS_ENDPOINT_URL": server.url,
        }

    def _has_ended(self, run: Run) -> bool:
        now = time.monotonic()
        if run.signal_after_s is not None and run.signal_at is None and run.server.begun.is_set():
            run.signal_at = now + run.signal_after_s
        if run.signal_at is not None and run.signalled_at is None and now >= run.signal_at:
            run.was_whole = (run.folder / VALIDATED).exists()
            os.kill(run.pid, run.number)
            run.signalled_at = now
        if _is_zombie(run.pid):
            run.took_s = now - (run.signalled_at or run.begun_at)
            run.ended = self._commands.wait(run.pid)
            return True
        if now - run.begun_at > 120:
            self._commands.kill(run.pid)
            run.took_s, run.ended = now - run.begun_at, Ended(-signal.SIGKILL, "", "hangs")
            return True
        return False

    # How it ended

    def _faults_of(self, run: Run) -> list[str]:
        assert run.ended is not None
        served, status, told = run.server.fault_names(), run.ended.status, run.ended.stderr
        wrong: list[str] = []
        if "Traceback" in told or status not in (0, 1, 128 + run.number):
            wrong.append(f"ends with status {status}: {told[-1500:]}")
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        if run.signalled_at is not None:
            ended_at = run.signalled_at + run.took_s
            may_end_well = (
                _began_at(run, errors, ended_at) - run.signalled_at <= _JUST_THEN_S or run.was_whole
            )
            is_ignored = run.took_s < SOON_S and status in (0, 1) and not may_end_well
            if is_ignored or "no longer waited for" in told:
                wrong.append(f"signal {run.number} leads to status {status}: {told[-800:]}")
            if run.took_s > SOON_S:
                wrong.append(f"{_LATE}: {run.took_s:.1f} s after signal {run.number}, {sorted(served)}")
        elif run.took_s > (allowed := _allowed_s(run)):
            wrong.append(f"{_LATE}: {run.took_s:.1f} s of {allowed:.1f} s, {sorted(served)}")
        if any("repair the cache" in line for line in errors):
            wrong.append(f"advises to repair what is another's: {errors}")
        if status == 1 and len(errors) != 1:
            wrong.append(f"{len(errors)} lines of errors: {told[-800:]}")
        elif status == 1 and not names_a_cause(errors[0], served) and run.signalled_at is None:
            wrong.append(f"{sorted(served)} is told as: {errors[0]}")
        if status == 1 and run.signalled_at is None and _must_pass(run):
            wrong.append(f"{sorted(served)} ends it: {errors}")
        return wrong + self._leavings(run) + (self._again(run) if status != 0 else [])

    def _leavings(self, run: Run) -> list[str]:
        assert run.ended is not None
        is_done = run.ended.status == 0
        wrong = [f"leaves {p}" for p in run.folder.rglob("*") if _is_leaving(p)]
        if run.kind == "train":
            digest, head = run.ended.stdout.split("\n", 1)[0].strip(), run.folder / "run" / "head.safetensors"
            if digest and digest != self._sources.features:
                wrong.append("reads other features")
            if is_done and not digest:
                wrong.append("read nothing")
            if (is_done or head.exists()) and head.read_bytes() != self._sources.head:
                wrong.append("trains another head")
        elif is_done or (run.folder / "pulled" / "manifest.json").exists():
            wrong += differences(_files(run.folder / "pulled"), _files(self._sources.root / "a"))
        return wrong

    def _again(self, run: Run) -> list[str]:
        """The server behaves, and the same command is given again."""
        run.server.schedule = None
        command = words(run.kind, run.url, run.folder)
        if (run.folder / "run" / "last.pt").exists():
            command.append("--resume")
        run.ended = self._commands.run(*command, **self._environment(run.folder, run.server))
        if run.ended.status != 0:
            return [f"run again, it ends with {run.ended}"]
        return [f"run again: {fault}" for fault in self._leavings(run)]


def _allowed_s(run: Run) -> float:
    with run.server.lock:
        served = [name for _, name in run.server.served]
    if run.server.schedule is not None and run.server.schedule.is_lasting and "delay" not in served:
        return 4 * PATIENCE_S + SLACK_S
    costs = (PATIENCE_S if FAULTS[name].waits else _COST_S.get(name, 0.5) for name in served)
    return 4 * PATIENCE_S + SLACK_S + sum(costs)


def _must_pass(run: Run) -> bool:
    """Whether a client that asks again for as long as it may comes through."""
    served = run.server.fault_names()
    if run.server.schedule is not None and run.server.schedule.is_lasting:
        return served <= {"delay"}
    quick = {name for name, fault in FAULTS.items() if fault.passes and not fault.waits}
    with run.server.lock:
        restarts = sum(name == "restart" for _, name in run.server.served)
    if (
        run.kind == "s3"
    ):  # nothing redirects a bucket's requests, and none of its answers is more than was asked for
        quick -= {"redirect on this host", "redirect elsewhere", "the whole file"}
    return served <= quick - set(_COST_S) | {"delay", "restart"} and restarts <= 2


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _began_at(run: Run, told: list[str], ended_at: float) -> float:
    """When what a run ends with began: the error that it tells was made, or it has ended."""
    path = run.folder / ERRORS
    made = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return min([at for at, text in made if any(text in line for line in told)], default=ended_at)


def _is_leaving(path: Path) -> bool:
    return path.is_file() and (re.match(r"\.tmp-", path.name) is not None or path.parent.name == "locks")


def _files(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(cache).items() if not name.startswith("locks/")}
