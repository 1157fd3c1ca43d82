"""What a sweep came to: a row for each run, means over seeds, and the file that holds them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.runs import (
    Interval,
    RunFile,
    comparable_rows,
    deviation_of,
    differences,
    distinct_names,
    read_json,
    read_run_config,
    wilson_interval,
    write_json,
)
from evl_cache.sweep.grid import SweepRun
from evl_cache.train import read_result

SWEEP_NAME = "sweep.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One run of a sweep, as `sweep.json` has it.

    Attributes:
        name, group, options: as `SweepRun`.
        status: `done`, `diverged` or `waiting`.
        error: how it diverged.
        top1, top5, val_clips, parameters: figures of a run that is done, as `TrainResult`.
        top1_interval: 95 % of `top1` over the validation clips, by Wilson's score.
        ms_per_step: forward, backward and optimiser of this head alone, without reading and decoding.
    """

    name: str
    group: str
    status: str
    options: Mapping[str, Any]
    error: str | None = None
    top1: float | None = None
    top5: float | None = None
    parameters: int | None = None
    ms_per_step: float | None = None
    val_clips: int | None = None
    top1_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class SweepGroup:
    """Means over runs that differ in their seed alone.

    Attributes:
        deviation: standard deviation of top1, as of a sample; None for one run.
        top1_interval: 95 % of one run's `top1` over the validation clips, by Wilson's score; None for several.
    """

    group: str
    runs: int
    top1: float
    deviation: float | None
    top5: float
    parameters: int
    ms_per_step: float
    top1_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What `sweep.json` holds.

    Attributes:
        groups: the best first.
        passes: names of the runs that this call trained together.
        sample_nbytes: bytes read of a sample, decompressed, by pass.
        seconds: that the sweep took, in this call and those that it goes on with.
    """

    runs: tuple[SweepRow, ...]
    groups: tuple[SweepGroup, ...]
    passes: tuple[tuple[str, ...], ...]
    sample_nbytes: tuple[int, ...]
    seconds: float


def _with_interval(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row or group as it was written; those of earlier versions have no interval."""
    interval = values.get("top1_interval")
    return {**values, "top1_interval": None if interval is None else tuple(interval)}


def read_sweep(out: str | Path) -> SweepResult:
    """Read what a sweep came to, so far. Raises: UsageError where there is none."""
    out = Path(out)
    try:
        content = read_json(out / SWEEP_NAME)
        if content.pop("format") != _FORMAT:
            raise UsageError(f"{out / SWEEP_NAME}: of another format; this evl-cache reads format {_FORMAT}")
        return SweepResult(
            runs=tuple(SweepRow(**_with_interval(row)) for row in content["runs"]),
            groups=tuple(SweepGroup(**_with_interval(group)) for group in content["groups"]),
            passes=tuple(tuple(part) for part in content["passes"]),
            sample_nbytes=tuple(content["sample_nbytes"]),
            seconds=content["seconds"],
        )
    except OSError as error:
        raise UsageError(f"{out}: no sweep there ({error.strerror}); expected what sweep wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out / SWEEP_NAME}: not what sweep writes ({error})") from error


def write_sweep(out: Path, result: SweepResult) -> SweepResult:
    """Write `sweep.json`, and return what it holds."""
    write_json(out / SWEEP_NAME, {"format": _FORMAT, **asdict(result)})
    return result


def is_done(folder: Path) -> bool:
    return (folder / RunFile.RESULT).exists() and (folder / RunFile.CONFIG).exists()


def row_of(run: SweepRun, folder: Path, error: str | None) -> SweepRow:
    """Return the row of a run, from what its directory says."""
    figures: dict[str, Any] = {}
    if error is None and is_done(folder):
        figures = read_result(folder)
        figures["top1_interval"] = wilson_interval(figures["top1"], figures["val_clips"])
    status = "diverged" if error is not None else "done" if figures else "waiting"
    options = asdict(run.options)
    return SweepRow(name=run.name, group=run.group, status=status, options=options, error=error, **figures)


def groups_of(rows: Sequence[SweepRow], folder: Path) -> list[SweepGroup]:
    """Average comparable runs that are done over their seeds; the best group comes first, equals by name.

    Args:
        rows: of all runs.
        folder: of the run directories.
    """
    done = [row for row in rows if row.status == "done"]
    configs = [read_run_config(folder / row.name) for row in done]
    places = comparable_rows(configs)
    names = distinct_names(
        [done[row[0]].group for row in places],
        differences([configs[row[0]] for row in places]),
        otherwise=lambda place: done[places[place][0]].name,
    )
    groups = [_group(name, [done[place] for place in row]) for name, row in zip(names, places, strict=True)]
    return sorted(groups, key=lambda group: (-group.top1, group.group))


def _group(name: str, members: Sequence[SweepRow]) -> SweepGroup:
    top1 = [row.top1 or 0.0 for row in members]
    return SweepGroup(
        group=name,
        runs=len(members),
        top1=statistics.mean(top1),
        deviation=deviation_of(top1),
        top5=statistics.mean(row.top5 or 0.0 for row in members),
        parameters=members[0].parameters or 0,
        ms_per_step=statistics.mean(row.ms_per_step or 0.0 for row in members),
        top1_interval=members[0].top1_interval if len(members) == 1 else None,
    )
