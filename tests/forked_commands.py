"""Runs commands of evl-cache in children that may be killed. As a script: the process that forks them.

It imports once, so that a command costs a fraction of a second, and touches no network itself.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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


class Commands:
    """`start` and `wait`, or `run`; signals go to the process id."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._outputs: dict[int, Path] = {}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        assert self._answer() == "ready"

    def start(self, *arguments: object, **environment: str) -> int:
        self._count += 1
        out = self._folder / f"out-{self._count}"
        question = {"argv": [str(a) for a in arguments], "environment": environment, "out": str(out)}
        pid = int(self._ask(question))
        self._outputs[pid] = out
        return pid

    def wait(self, pid: int) -> Ended:
        status = int(self._ask({"wait": pid}))
        out = self._outputs.pop(pid)
        return Ended(status, out.read_text(), out.with_suffix(".err").read_text())

    def run(self, *arguments: object, **environment: str) -> Ended:
        return self.wait(self.start(*arguments, **environment))

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid).status == -signal.SIGKILL

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _run(question: dict[str, Any]) -> None:
    """In the child; does not return."""
    status = 1
    try:
        for number, name in ((1, question["out"]), (2, question["out"] + ".err")):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        os.environ.update(question["environment"])
        from evl_cache_cli.main import main

        main(question["argv"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch

    import evl_cache.catalog
    import evl_cache.share
    import evl_cache.train  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
        elif (pid := os.fork()) == 0:
            _run(question)
        else:
            print(pid, file=answers, flush=True)


if __name__ == "__main__":
    _serve()
