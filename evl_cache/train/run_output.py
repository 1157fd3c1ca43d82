"""What a training writes into its run directory: its logs, its heads, the last state, and what it came to."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evl_cache.clips import Clip
from evl_cache.heads import Head
from evl_cache.runs import (
    RunFile,
    RunLog,
    RunWriter,
    Scores,
    save_head,
    save_state,
    write_json,
    write_report,
)
from evl_cache.train.result import TrainResult


class RunOutput:
    """The run directory of a training: one of its processes writes there, as long as it has the right to.

    Args:
        out: the run directory.
        is_written: whether this process is the one.
        writer: the right to write, where it can be lost.
        tensorboard: see `RunLog`.

    Attributes:
        log: of steps and epochs.
    """

    def __init__(self, out: Path, *, is_written: bool, writer: RunWriter | None, tensorboard: bool) -> None:
        self._out, self._is_written, self._writer = out, is_written, writer
        self.log = RunLog(out if is_written else None, tensorboard=tensorboard)

    def check(self) -> None:
        """Check that this process may still write. Raises: as `RunWriter.check`."""
        if self._writer is not None:
            self._writer.check()

    def write_head(self, head: Head, *, is_best: bool) -> None:
        """Write the head of an epoch, as that of the best one too where it is. `check` comes before."""
        if self._is_written:
            save_head(self._out, head)
            if is_best:
                save_head(self._out, head, best=True)

    def write_state(self, state: dict[str, Any]) -> None:
        """Write the state that the run can be continued from, behind the log's lines. Raises: as `check`."""
        if self._is_written:
            self.check()
            self.log.flush()
            save_state(self._out, state)

    def write_result(
        self, result: TrainResult, scores: Scores, classes: Sequence[str], clips: Sequence[Clip]
    ) -> None:
        """Write what the run came to, and what its last validation said of the clips. Raises: as `check`."""
        if self._is_written:
            self.check()
            write_report(self._out, scores, classes, clips)
            write_json(self._out / RunFile.RESULT, asdict(result))
