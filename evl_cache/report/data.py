"""Gather what run directories hold for a report: curves, results, confusion, clips."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.canonical_json import digest
from evl_cache.errors import UsageError
from evl_cache.runs import RunConfig, RunFile, read_json, read_json_lines, read_run_config
from evl_cache.sweep import RUNS_NAME, SWEEP_NAME, read_sweep
from evl_cache.train import OPERATIONAL

_OF_A_SEED = OPERATIONAL | {"seed", "order_seed"}


@dataclass(frozen=True, kw_only=True)
class ScoredClip:
    """One validation clip and what the head predicted.

    Attributes:
        clip: its id.
        label: name of its class.
        said: name of the class predicted.
        p_label: probability of its class.
        p_said: probability of the class predicted.
    """

    clip: str
    label: str
    said: str
    p_label: float
    p_said: float


@dataclass(frozen=True, kw_only=True)
class RunAccount:
    """One finished run.

    Attributes:
        path: of its directory.
        name: its name.
        group: name of the runs that differ in their seed alone.
        config: as the directory has it.
        epochs: lines of `metrics.jsonl`.
        result: content of `result.json`.
        confusion: number of clips by class and class predicted, int64 (K, K).
        scored: every validation clip; empty for old runs.
    """

    path: Path
    name: str
    group: str
    config: RunConfig
    epochs: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any]
    confusion: np.ndarray
    scored: tuple[ScoredClip, ...]

    @property
    def label(self) -> str:
        """The name for people: the group of a sweep and the seed, or the run's name."""
        is_named = self.group != _group_key(self.config)
        return f"{self.group}, seed {self.config.training.get('seed')}" if is_named else self.name

    @property
    def step_seconds(self) -> float | None:
        """Seconds of all training steps, or None where the run does not say."""
        ms = self.result.get("ms_per_step")
        return None if ms is None else ms * self.result["steps"] / 1e3

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent after the last epoch."""
        return float(self.result["top1"])

    @property
    def bytes_read(self) -> int | None:
        """Decompressed bytes that all epochs of training and validation read, or None where the run does not say."""
        sides = [self.config.caches.get(side, {}) for side in ("train", "val")]
        if any("sample_nbytes" not in side for side in sides):
            return None
        return sum(int(side["sample_nbytes"] * side["samples"] * self.result["epochs"]) for side in sides)

    def wrongest(self, count: int) -> list[ScoredClip]:
        """Return the clips that were mistaken, the surest first."""
        wrong = [clip for clip in self.scored if clip.label != clip.said]
        return sorted(wrong, key=lambda clip: (-clip.p_said, clip.clip))[:count]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: tuple[RunAccount, ...]

    @property
    def top1(self) -> float:
        """Mean top-1 accuracy in percent."""
        return statistics.mean(run.top1 for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the runs' top-1 (of a sample), or None for one run."""
        return statistics.stdev(run.top1 for run in self.runs) if len(self.runs) > 1 else None

    def curve(self, name: str) -> np.ndarray:
        """Return a figure of every run and epoch, float64 (runs, epochs), up to the shortest run's last epoch."""
        length = min(len(run.epochs) for run in self.runs)
        return np.asarray([[float(row[name]) for row in run.epochs[:length]] for run in self.runs])


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        title: of the page.
        groups: the best first.
        unfinished: name and reason of each run of a sweep that has no result.
    """

    title: str
    groups: tuple[Group, ...]
    unfinished: tuple[tuple[str, str], ...]

    @property
    def runs(self) -> list[RunAccount]:
        """All runs, the best group first."""
        return [run for group in self.groups for run in group.runs]

    @property
    def best(self) -> RunAccount:
        """The run with the highest top-1 of the best group."""
        return max(self.groups[0].runs, key=lambda run: run.top1)


def gather(paths: Sequence[str | Path]) -> ReportData:
    """Read directories of runs and sweeps. Raises: UsageError for other directories, or where no run is finished."""
    runs: list[RunAccount] = []
    unfinished: list[tuple[str, str]] = []
    for path in map(Path, paths):
        if not (path / SWEEP_NAME).exists():
            runs.append(read_account(path))
            continue
        for row in read_sweep(path).runs:
            if row.status == "done":
                runs.append(read_account(path / RUNS_NAME / row.name, name=row.name, group=row.group))
            else:
                unfinished.append((row.name, row.error or row.status))
    if not runs:
        raise UsageError(f"{', '.join(map(str, paths))}: no run is finished; train one to its end first")
    groups = _grouped(runs)
    title = ", ".join(Path(path).resolve().name for path in paths)
    return ReportData(title=title, groups=tuple(groups), unfinished=tuple(unfinished))


def read_account(path: Path, *, name: str | None = None, group: str | None = None) -> RunAccount:
    """Read one run; `name` and `group` are those that a sweep gave it.

    Raises: UsageError where there is no run, or it is not finished.
    """
    config = read_run_config(path)
    try:
        result = read_json(path / RunFile.RESULT)
        epochs = read_json_lines(path / RunFile.METRICS)
        with (path / RunFile.CONFUSION).open(encoding="utf-8", newline="") as file:
            confusion = np.asarray([row[1:] for row in list(csv.reader(file))[1:]], dtype=np.int64)
        scored = _read_scored(path / RunFile.SCORED)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.filename} cannot be read ({error.strerror}); train it to its end first"
        ) from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}: not what train writes ({error}); train it again") from error
    if not epochs:
        raise UsageError(f"{path}: no epoch in {RunFile.METRICS}; train it to its end first")
    return RunAccount(
        path=path,
        name=name or path.resolve().name,
        group=group or _group_key(config),
        config=config,
        epochs=tuple(epochs),
        result=result,
        confusion=confusion,
        scored=scored,
    )


def _read_scored(path: Path) -> tuple[ScoredClip, ...]:
    if not path.exists():  # older runs have none
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(
            ScoredClip(
                clip=row["clip"],
                label=row["class"],
                said=row["said"],
                p_label=float(row["p_class"]),
                p_said=float(row["p_said"]),
            )
            for row in csv.DictReader(file)
        )


def _group_key(config: RunConfig) -> str:
    training = {name: value for name, value in config.training.items() if name not in _OF_A_SEED}
    return digest([config.head, dict(config.head_config), config.layers, training, config.classes])


def _grouped(runs: Sequence[RunAccount]) -> list[Group]:
    """Return groups, the best first; a group that no sweep named has the name of its first run."""
    members: dict[str, list[RunAccount]] = {}
    for run in runs:
        members.setdefault(run.group, []).append(run)
    groups = []
    for key, found in members.items():
        is_named = key != _group_key(found[0].config)
        groups.append(Group(name=key if is_named else found[0].name, runs=tuple(found)))
    return sorted(groups, key=lambda group: (-group.top1, group.name))
