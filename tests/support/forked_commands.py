"""Commands of evl-cache in children that may be killed. As a script: the process that forks them."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fork_server import ForkServer, serve
from tests.support.recorded import note_shown
from tests.support.store_helpers import is_stopped, wait_until, watched_changes


@dataclass(frozen=True)
class Ended:
    """Exit status (negative: by that signal), and what was printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self
        return json.loads(self.stdout)


class Commands(ForkServer):
    """`start` and `wait`, or `run`. script: what serves the jobs; this file's are commands."""

    def __init__(self, folder: Path, *, script: str = __file__) -> None:
        self._folder, self._count = folder, 0
        self._outputs: dict[int, Path] = {}
        super().__init__(script)

    def start(self, *arguments: object, stops_with: str = "", **environment: str) -> int:
        """Start a command.

        Args:
            stops_with: end of a path: the child stops (SIGSTOP) as soon as it has given a file this name.
        """
        self._count += 1
        out = self._folder / f"out-{self._count}"
        pid = self.fork(
            {
                "argv": [str(a) for a in arguments],
                "environment": environment,
                "out": str(out.absolute()),
                "stops_with": stops_with,
            }
        )
        self._outputs[pid] = out
        return pid

    def output_of(self, pid: int) -> Path:
        """What a command prints so far, and with `.err` its errors."""
        return self._outputs[pid]

    def wait(self, pid: int) -> Ended:
        status = self.ended(pid)
        out = self._outputs.pop(pid)
        ended = Ended(status, out.read_text(), out.with_suffix(".err").read_text())
        note_shown(ended.stdout, ended.stderr)
        return ended

    def run(self, *arguments: object, **environment: str) -> Ended:
        return self.wait(self.start(*arguments, **environment))

    def kill_stopped(self, pid: int) -> None:
        """Once the child has stopped."""
        wait_until(lambda: is_stopped(pid), what="the child comes to the file that it stops with")
        self.kill(pid)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid).status == -signal.SIGKILL


def run_command(job: dict[str, Any]) -> None:
    """A command, its output in files."""
    take_streams(job)
    from evl_cache_cli.main import main

    def saw(name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        result = call()
        if name in ("link", "rename", "replace") and str(args[1]).endswith(job["stops_with"]):
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    with watched_changes(saw) if job["stops_with"] else nullcontext():
        main(job["argv"])


def take_streams(job: dict[str, Any]) -> None:
    """Print into the files of a job from now on, in its environment."""
    for number, name in ((1, job["out"]), (2, job["out"] + ".err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(job["environment"])


def serve_commands(work: Callable[[dict[str, Any]], None] = run_command) -> None:
    """Serve jobs with what commands need loaded."""
    import torch

    import evl_cache.caches.pairing
    import evl_cache.caches.share
    import evl_cache.train.stage  # noqa: F401

    torch.set_num_threads(1)
    serve(work)


if __name__ == "__main__":
    serve_commands()
