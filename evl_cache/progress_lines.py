"""Progress lines: on stderr of a terminal, or as a widget in a notebook; silent elsewhere."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose stderr is no terminal but is read by a person all the same."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _line(*, shown: bool = True, **options: Any) -> Any:
    if not in_notebook():
        from tqdm import tqdm

        return tqdm(**options, disable=None if shown else True)  # None: silent where stderr is no terminal
    if importlib.util.find_spec("ipywidgets") is None:
        from tqdm import tqdm
    else:
        from tqdm.notebook import tqdm
    return tqdm(**options, disable=not shown)


class ClipProgress:
    """A progress line of clips: called with whether one failed."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._told: dict[str, Any] = {}

    def __call__(self, clip_failed: bool) -> None:
        if clip_failed:
            self._told["failed"] = self._told.get("failed", 0) + 1
        self._bar.set_postfix(self._told, refresh=False)
        self._bar.update()

    def note_bottleneck(self, name: str) -> None:
        """What extraction waits for: `decoding`, `transfer`, `device` or `writing`."""
        self._told["bottleneck"] = name


@contextmanager
def clip_progress(total: int, description: str, *, shown: bool = True) -> Iterator[ClipProgress]:
    """A line on stderr with clips/s, time left, failures, bottleneck; quiet where stderr is no terminal."""
    with _line(total=total, desc=description, unit=" clip", shown=shown) as bar:
        yield ClipProgress(bar)


@contextmanager
def extract_progress(
    num_clips: int, split: str, *, shown: bool = True
) -> Iterator[tuple[ClipProgress, Callable[[str], None]]]:
    """The progress line of a cache that is extracted, by all jobs on it together."""
    with clip_progress(num_clips, f"extract {split}", shown=shown) as line:
        yield line, line.note_bottleneck


class StepProgress:
    """A progress line of steps: called with (steps done, steps in all, loss)."""

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
        """What training waits for: `device`, `disk` or `processor`."""
        self._waits_for = name


@contextmanager
def step_progress(description: str) -> Iterator[StepProgress]:
    """A line on stderr with steps/s, time left, the loss and the bottleneck; quiet where stderr is no terminal."""
    with _line(desc=description, unit=" step") as bar:
        yield StepProgress(bar)


@contextmanager
def block_progress(description: str) -> Iterator[Callable[[bool], None]]:
    """A line on stderr with blocks/s and how many were copied; quiet where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=description, unit=" block", disable=None) as bar:
        copied = 0

        def on_block(moved: bool) -> None:
            nonlocal copied
            copied += moved
            bar.set_postfix(copied=copied, refresh=False)
            bar.update()

        yield on_block
