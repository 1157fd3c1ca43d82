"""A process that forks a child for every job, so that a job costs a fraction of a second; children may be killed.

It loads what all jobs need once, uses one thread, and touches no network itself. `ForkServer` is the side of the
tests, `serve` that of the process.
"""

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]


class ForkServer:
    """`fork` and `ended`; signals are sent by process id.

    Args:
        script: a file that calls `serve`. arguments: of it.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [warm_python(), script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
            cwd=ROOT,
        )
        assert self._answer() == "ready"

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, job: Mapping[str, Any]) -> int:
        """Process id of the child that does the job."""
        return int(self._ask({"job": job}))

    def ended(self, pid: int) -> int:
        """Wait for a child. Returns: its exit status; negative: by that signal."""
        return int(self._ask({"wait": pid}))

    def signal(self, pid: int, number: int) -> None:
        """To a child, by its pid where it runs."""
        assert self._ask({"signal": [pid, number]}) == "sent"

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, question: Mapping[str, Any]) -> str:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve(work: Callable[[dict[str, Any]], None]) -> None:
    """Until stdin ends. work: does a job, in a child of its own."""
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer: object
        if "signal" in question:
            os.kill(*question["signal"])
            answer = "sent"
        elif "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            _end_with(work, question["job"])
        print(answer, file=answers, flush=True)


def _end_with(work: Callable[[dict[str, Any]], None], job: dict[str, Any]) -> None:
    """In the child; does not return."""
    status = 1
    try:
        try:
            work(job)
            status = 0
        except SystemExit as end:
            status = _status_of(end)
    except SystemExit as end:  # of a signal that came just then
        status = _status_of(end)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # threads that are no daemons end first, as in any Python
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status_of(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else int(bool(end.code))
