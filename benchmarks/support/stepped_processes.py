"""Processes that go step by step, all together: each has imported, then each works, then each is measured.

A step is what a generator does up to its next `yield`; what it yields is a JSON object. `serve` runs such a generator
in a process of its own, and `run_together` starts some of these.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Steps = Callable[..., Iterator[Mapping[str, Any]]]
_MARK = "step of benchmark: "


def run_together(
    module: str, part: str, arguments: Sequence[Mapping[str, Any]], *, env: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run `part` of a module that calls `serve`, in a process for each of `arguments`.

    No process begins a step before all have ended the one before. Returns: for each process what its steps yielded, as
    one object. Raises: RuntimeError where a process fails.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, part, json.dumps(of_one)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        for of_one in arguments
    ]
    found: list[dict[str, Any]] = [{} for _ in processes]
    try:
        goes_on = True
        while goes_on:
            steps = [_step(process, result) for process, result in zip(processes, found, strict=True)]
            goes_on = any(steps)
            for process in processes:
                assert process.stdin is not None
                if goes_on:
                    process.stdin.write("\n")
                    process.stdin.flush()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


def _step(process: "subprocess.Popen[str]", result: dict[str, Any]) -> bool:
    """Wait for a step's end. Whether the process goes on."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_MARK):
            content = json.loads(line.removeprefix(_MARK))
            if content is None:
                return False
            result.update(content)
            return True
    raise RuntimeError(f"a process of the benchmark failed (exit {process.wait()}): {process.args!r}")


def serve(parts: Mapping[str, Steps]) -> None:
    """Run the part that the command line names with its arguments, a step for each line of stdin."""
    part, arguments = sys.argv[1:]
    for content in parts[part](**json.loads(arguments)):
        print(_MARK + json.dumps(dict(content)), flush=True)
        sys.stdin.readline()
    print(_MARK + "null", flush=True)
