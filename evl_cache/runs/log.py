"""What a run writes while it trains: a JSON line a step, one an epoch, and TensorBoard's files if asked for."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO

from evl_cache.canonical_json import json_text
from evl_cache.errors import UsageError
from evl_cache.runs.directory import RunFile
from evl_cache.runs.whole_files import refusals_named, write_text

TENSORBOARD_NAME = "tensorboard"


class RunLog:
    """The logs of a run directory; without a directory (in a process that is not the first) nothing is written.

    A context manager, which closes them; `keep` opens them.

    Raises: UsageError for TensorBoard where it is not installed.
    """

    def __init__(self, out: Path | None, *, tensorboard: bool = False) -> None:
        self._out = out
        self._writer_class = _summary_writer() if tensorboard and out is not None else None
        self._writer: Any = None
        self._steps: TextIO | None = None

    def keep(self, *, steps: int, epochs: int) -> None:
        """Open the logs, and drop the lines of later steps and epochs, which a continued run does again."""
        if self._out is None:
            return
        for name, count in ((RunFile.STEPS, steps), (RunFile.METRICS, epochs)):
            path = self._out / name
            lines = path.read_text(encoding="utf-8").splitlines()[:count] if path.exists() else []
            # A new file: a writer that was taken for dead, and is not, still writes to the old one.
            write_text(path, "".join(f"{line}\n" for line in lines))
        with refusals_named(self._out / RunFile.STEPS):
            self._steps = (self._out / RunFile.STEPS).open("a", encoding="utf-8")
        if self._writer_class is not None:
            self._writer = self._writer_class(str(self._out / TENSORBOARD_NAME), purge_step=steps + 1)

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Add a line to `steps.jsonl`; it is on the disk after the next `flush`. Raises: as `json_text`."""
        if self._out is not None and self._steps is not None:
            line = json_text({"step": number, **values})
            with refusals_named(self._out / RunFile.STEPS):
                self._steps.write(line + "\n")
        self._write_scalars("train", number, values)

    def epoch(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl`. Raises: as `json_text`; the file stays as it was."""
        if self._out is not None:
            path, line = self._out / RunFile.METRICS, json_text(values)
            with refusals_named(path), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._write_scalars("epoch", step, values)

    def flush(self) -> None:
        """Put every line so far on the disk, before a state that counts on them."""
        if self._out is not None and self._steps is not None:
            with refusals_named(self._out / RunFile.STEPS):
                self._steps.flush()
                os.fsync(self._steps.fileno())

    def _write_scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._steps is not None:
            with suppress(OSError):  # of lines since the last `flush`, on which no state counts
                self._steps.close()
        if self._writer is not None:
            self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard: TensorBoard is not installed ({error}); pip install 'evl-cache[tensorboard]', "
            "or read metrics.jsonl and steps.jsonl"
        ) from error
    return SummaryWriter
