"""Gather what run directories hold for a report: curves, results, confusion, clips."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.runs import (
    Interval,
    RunConfig,
    RunFile,
    comparable_key,
    comparable_rows,
    deviation_of,
    differences,
    distinct_names,
    is_online,
    read_json,
    read_json_lines,
    read_run_config,
    wilson_interval,
)
from evl_cache.spec import CacheSpec
from evl_cache.sweep import RUNS_NAME, SWEEP_NAME, read_sweep


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
        sweep_group: the name that its sweep gave to the runs that differ in their seed alone; None of a single run.
        config: as the directory has it.
        epochs: lines of `metrics.jsonl`.
        result: content of `result.json`.
        confusion: number of clips by class and class predicted, int64 (K, K).
        scored: every validation clip; empty for old runs.
    """

    path: Path
    name: str
    sweep_group: str | None
    config: RunConfig
    epochs: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any]
    confusion: np.ndarray
    scored: tuple[ScoredClip, ...]

    @property
    def label(self) -> str:
        """The name for people: the group of a sweep and the seed, or the run's name."""
        if self.sweep_group is None:
            return self.name
        return f"{self.sweep_group}, seed {self.config.training.get('seed')}"

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
    def interval(self) -> Interval:
        """The 95 % interval of `top1` over the validation clips."""
        return wilson_interval(self.top1, int(self.result["val_clips"]))

    @property
    def bytes_read(self) -> int | None:
        """Decompressed bytes that training and validation read, or None where the run does not say, or read no cache."""
        sides = [self.config.caches.get(side, {}) for side in ("train", "val")]
        if any("sample_nbytes" not in side for side in sides) or is_online(self.config):
            return None
        train, val = sides
        validated = val["samples"] * self.result["epochs"]
        return int(train["sample_nbytes"] * self._samples_trained + val["sample_nbytes"] * validated)

    @property
    def _samples_trained(self) -> int:
        """Samples that the steps took: an epoch has one of several augmented views of a clip, the last one may be cut."""
        features = self.config.features
        views = 0 if features is None else CacheSpec.from_json(features).views.train_views
        of_epoch = int(self.config.caches["train"]["samples"]) // max(1, views)
        batch = int(self.result["batch"])
        epochs, steps = divmod(int(self.result["steps"]), max(1, -(-of_epoch // batch)))
        return epochs * of_epoch + int(min(steps * batch, of_epoch))

    def wrongest(self, count: int) -> list[ScoredClip]:
        """Return the clips that were mistaken, the surest first."""
        wrong = [clip for clip in self.scored if clip.label != clip.said]
        return sorted(wrong, key=lambda clip: (-clip.p_said, clip.clip))[:count]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        name: no other group's.
        runs: each of another seed.
        told: what tells it apart from the other groups, such as `lr 0.001`.
    """

    name: str
    runs: tuple[RunAccount, ...]
    told: str = ""

    @property
    def top1(self) -> float:
        """Mean top-1 accuracy in percent."""
        return statistics.mean(run.top1 for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the runs' top-1 (of a sample), or None for one run."""
        return deviation_of([run.top1 for run in self.runs])

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of one run's top-1 over its clips; None for several, whose seeds have a deviation."""
        return self.runs[0].interval if len(self.runs) == 1 else None

    @property
    def whisker(self) -> Interval:
        """From where to where the top-1 may be: by the deviation over seeds, or by the clips of one run."""
        if self.interval is not None:
            return self.interval
        spread = self.deviation or 0.0
        return (max(0.0, self.top1 - spread), min(100.0, self.top1 + spread))

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
    def is_of_several_clip_sets(self) -> bool:
        """Whether groups were scored on different clips, so that their accuracies do not compare."""
        return len({_scored_on(group.runs[0].config) for group in self.groups}) > 1

    @property
    def best(self) -> RunAccount:
        """The run with the highest top-1 of the best group."""
        return max(self.groups[0].runs, key=lambda run: run.top1)


def gather(paths: Sequence[str | Path]) -> ReportData:
    """Read directories of runs and sweeps. Raises: UsageError for other directories, or where no run is finished."""
    runs: list[RunAccount] = []
    unfinished: list[tuple[str, str]] = []
    seen: set[Path] = set()

    def add(path: Path, **named: str) -> None:
        if path.resolve() not in seen:  # a run that is named twice is one
            seen.add(path.resolve())
            runs.append(read_account(path, **named))

    for path in map(Path, paths):
        if not (path / SWEEP_NAME).exists():
            add(path)
            continue
        for row in read_sweep(path).runs:
            if row.status != "done":
                unfinished.append((row.name, row.error or row.status))
                continue
            try:
                add(path / RUNS_NAME / row.name, name=row.name, group=row.group)
            except UsageError as error:  # it had diverged, say, which earlier versions counted as done
                unfinished.append((row.name, str(error)))
    if not runs:
        raise UsageError(f"{', '.join(map(str, paths))}: no run is finished; train one to its end first")
    groups = _grouped(runs)
    title = ", ".join(Path(path).resolve().name for path in paths)
    return ReportData(title=title, groups=tuple(groups), unfinished=tuple(unfinished))


def group_json(group: Group) -> dict[str, Any]:
    """Return the figures of a group as plain JSON values."""
    return {
        "name": group.name,
        "told": group.told,
        "runs": [str(run.path) for run in group.runs],
        "top1": group.top1,
        "top1_deviation": group.deviation,
        "top1_interval": None if group.interval is None else list(group.interval),
        "val_clips": int(group.runs[0].result["val_clips"]),
        "bytes_read": group.runs[0].bytes_read,
    }


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
        _check_result(result)
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
        sweep_group=group,
        config=config,
        epochs=tuple(epochs),
        result=result,
        confusion=confusion,
        scored=scored,
    )


def _check_result(result: object) -> None:
    if not isinstance(result, dict):
        raise ValueError(f"{RunFile.RESULT} holds {str(result)[:40]!r}, expected an object")
    for name in ("top1", "top5", "val_clips", "epochs", "steps", "batch"):
        if type(result[name]) not in (int, float):
            raise ValueError(f"{name} of {RunFile.RESULT} is {str(result[name])[:40]!r}, expected a number")


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


def _scored_on(config: RunConfig) -> tuple[Any, ...]:
    """What says which clips a run was scored on; earlier versions recorded samples of a cache, not clips of a list."""
    val = config.caches.get("val", {})
    names = ("content_id", "clips") if val.get("clips") else ("fingerprint", "samples_sha256")
    return tuple(val.get(name) for name in names)


def _told_apart(firsts: Sequence[RunAccount]) -> list[str]:
    """Return what tells rows apart, by the first run of each; nothing for groups of one sweep, whose names say it all."""
    told = differences([run.config for run in firsts])
    of_sweep = [run.sweep_group for run in firsts]
    folders = {run.path.resolve().parent for run in firsts}
    if None not in of_sweep and len(folders) == 1 and len(set(of_sweep)) == len(firsts):
        return ["" for _ in firsts]
    keys = [comparable_key(run.config) for run in firsts]
    for place, key in enumerate(keys):
        if key in keys[:place]:
            told[place] = ", ".join(filter(None, (told[place], "done again with the same seed")))
    return told


def _grouped(runs: Sequence[RunAccount]) -> list[Group]:
    """Return groups, the best first, each with the name that a sweep gave it, or that of its first run."""
    members = [[runs[place] for place in row] for row in comparable_rows([run.config for run in runs])]
    firsts = [found[0] for found in members]
    told = _told_apart(firsts)
    names = distinct_names(
        [run.sweep_group or run.name for run in firsts],
        told,
        otherwise=lambda place: str(firsts[place].path),
    )
    groups = [
        Group(name=name, runs=tuple(found), told=text)
        for name, found, text in zip(names, members, told, strict=True)
    ]
    return sorted(groups, key=lambda group: (-group.top1, group.name))
