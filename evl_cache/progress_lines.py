"""Show progress as a line on a terminal's stderr or as a notebook's widget; show nothing elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose stderr a person reads though it is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _line(*, shown: bool = True, **options: Any) -> Any:
    if not in_notebook():
        from tqdm import tqdm

        return tqdm(
            **options, disable=None if shown else True
        )  # None shows nothing where stderr is no terminal
    if importlib.util.find_spec("ipywidgets") is None:
        from tqdm import tqdm
    else:
        from tqdm.notebook import tqdm
    return tqdm(**options, disable=not shown)


class ClipProgress:
    """A progress line of clips. Call it after each clip, with whether it failed."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._told: dict[str, Any] = {}

    def __call__(self, clip_failed: bool) -> None:
        if clip_failed:
            self._told["failed"] = self._told.get("failed", 0) + 1
        self._bar.set_postfix(self._told, refresh=False)
        self._bar.update()

    def note_bottleneck(self, name: str) -> None:
        """Show what extraction waits for: `decoding`, `transfer`, `device` or `writing`."""
        self._told["bottleneck"] = name


@contextmanager
def clip_progress(total: int, description: str, *, shown: bool = True) -> Iterator[ClipProgress]:
    """Show clips/s, time left, failures and the bottleneck on one line."""
    with _line(total=total, desc=description, unit=" clip", shown=shown) as bar:
        yield ClipProgress(bar)


@contextmanager
def extract_progress(
    num_clips: int, split: str, *, shown: bool = True
) -> Iterator[tuple[ClipProgress, Callable[[str], None]]]:
    """Show the progress of a cache that is extracted, by all jobs on it together."""
    with clip_progress(num_clips, f"extract {split}", shown=shown) as line:
        yield line, line.note_bottleneck


class StepProgress:
    """A progress line of steps. Call it with steps done, steps in all, the loss or None, and other numbers to show."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._waits_for = bar, "device"

    def __call__(self, done: int, total: int, loss: float | None, **more: int) -> None:
        self._bar.total = total
        told: dict[str, Any] = {**more, "bottleneck": self._waits_for}
        if loss is not None:
            told = {"loss": f"{loss:.3f}", **told}
        self._bar.set_postfix(told, refresh=False)
        self._bar.update(done - self._bar.n)

    def note_bottleneck(self, name: str) -> None:
        """Show what training waits for: `device`, `disk` or `processor`."""
        self._waits_for = name


@contextmanager
def step_progress(description: str, *, shown: bool = True) -> Iterator[StepProgress]:
    """Show steps/s, time left, the loss and the bottleneck on one line, where `shown`."""
    with _line(desc=description, unit=" step", shown=shown) as bar:
        yield StepProgress(bar)


@contextmanager
def block_progress(description: str) -> Iterator[Callable[[bool], None]]:
    """Show blocks/s and how many were copied on one line; call what is yielded with whether a block was copied."""
    from tqdm import tqdm

    with tqdm(desc=description, unit=" block", disable=None) as bar:
        copied = 0

        def on_block(moved: bool) -> None:
            nonlocal copied
            copied += moved
            bar.set_postfix(copied=copied, refresh=False)
            bar.update()

        yield on_block


_MARKS, _BYTES = "marks", "bytes"
_LEAST_S = 0.05  # between two looks of a line that is told of every few megabytes


@contextmanager
def verify_progress(description: str, *, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Show the marks that were read and then bytes/s, the bytes read and the time left, on one line, where `shown`.

    Call what is yielded with `marks` or `bytes`, how many are done, and how many there are; from one thread at a time.
    """
    units: dict[str, dict[str, Any]] = {
        _MARKS: {"desc": f"{description}: marks", "unit": " mark", "leave": False},
        _BYTES: {"desc": description, "unit": "B", "unit_scale": True},
    }
    bars: dict[str, Any] = {}
    told_s = 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal told_s
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = _line(**units[what], total=total, shown=shown)
        elif done < total and time.monotonic() - told_s < _LEAST_S:
            return
        told_s = time.monotonic()
        bars[what].update(done - bars[what].n)

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()
