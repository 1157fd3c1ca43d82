"""Ablations in one pass: many heads trained together from one cache, each as a training of its own would train it."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evl_cache.batches import samples_of_clips
from evl_cache.errors import UsageError
from evl_cache.processes import Processes, StopRequests, giving_back_memory
from evl_cache.runs import RUNS_NAME, OnWait, RunFile, RunWriter, write_json, writing
from evl_cache.store import FeatureCache, Reads
from evl_cache.sweep.grid import SweepRun
from evl_cache.sweep.memory import SharedRuns, plan_passes
from evl_cache.sweep.shared_pass import OnPassStep, PlannedRun, SweepPass
from evl_cache.train import (
    OPERATIONAL,
    all_reads,
    check_caches,
    make_loaders,
    shuffle_blocks,
    training_reads,
)

SWEEP_NAME = "sweep.json"
_FORMAT = 1
ProgressOfPass = Callable[[str], AbstractContextManager[OnPassStep]]


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One run of a sweep, as `sweep.json` has it.

    Attributes:
        name, group, options: as `SweepRun`.
        status: `done`, `diverged` or `waiting`.
        error: how it diverged.
        top1, top5, parameters: figures of a run that is done, as `TrainResult`.
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


@dataclass(frozen=True, kw_only=True)
class SweepGroup:
    """Means over runs that differ in their seed alone.

    Attributes:
        deviation: standard deviation of top1, as of a sample; None for one run.
    """

    group: str
    runs: int
    top1: float
    deviation: float | None
    top5: float
    parameters: int
    ms_per_step: float


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What `sweep.json` holds.

    Attributes:
        groups: the best first.
        passes: names of the runs that this call trained together.
        sample_nbytes: bytes read of a sample, decompressed, by pass.
        seconds: that this call took.
    """

    runs: tuple[SweepRow, ...]
    groups: tuple[SweepGroup, ...]
    passes: tuple[tuple[str, ...], ...]
    sample_nbytes: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The runs as they were asked for, the caches and samples of both sides, where everything goes, and who may write there."""

    runs: Sequence[SweepRun]
    caches: tuple[FeatureCache, FeatureCache]
    samples: tuple[Any, Any]
    folder: Path
    writer: RunWriter
    on_note: Callable[[str], None]


def sweep(
    train_cache: FeatureCache,
    val_cache: FeatureCache,
    *,
    runs: Sequence[SweepRun],
    out: Path,
    train_clips: Sequence[int] | None = None,
    val_clips: Sequence[int] | None = None,
    resume: bool = False,
    memory_bytes: int | None = None,
    progress: ProgressOfPass = lambda description: nullcontext(lambda done, total, heads: None),
    on_wait: OnWait = lambda message: None,
    on_note: Callable[[str], None] = lambda message: None,
) -> SweepResult:
    """Train every run and leave a run directory for each under `out`/runs, and `out`/sweep.json.

    Args:
        runs: from `sweep.grid.expand`.
        out: directory of the sweep.
        train_clips, val_clips: rows of the clip lists; all by default.
        resume: go on with a sweep of the same runs.
        memory_bytes: most that heads and a batch's features may take together; other heads wait for a later pass.
        progress: opens the progress line of a pass.
        on_wait: told once, if it must first be seen whether a writer on another machine lives.
        on_note: told in a line where fewer samples are kept than was asked for.

    Raises: UsageError where caches, heads and options do not fit each other, where `out` holds a sweep, or where
        another process writes it or one of its runs;
        Interrupted where a signal asked to stop, after every state was kept.
    """
    started = time.monotonic()
    samples = samples_of_clips(train_cache, train_clips), samples_of_clips(val_cache, val_clips)
    planned = [_planned(run, train_cache) for run in runs]
    check_caches((train_cache, val_cache), [p.reads for p in planned])
    beside = [out / RUNS_NAME / run.name for run in runs]
    with writing(out, beside=beside, on_wait=on_wait) as writer:
        data = _Data(
            runs=runs,
            caches=(train_cache, val_cache),
            samples=samples,
            folder=out / RUNS_NAME,
            writer=writer,
            on_note=on_note,
        )
        return _in_passes(planned, data, _begin(out, runs, resume=resume), started, memory_bytes, progress)


def _in_passes(
    planned: Sequence[PlannedRun],
    data: _Data,
    errors: dict[str, str],
    started: float,
    memory_bytes: int | None,
    progress: ProgressOfPass,
) -> SweepResult:
    """Train what is not done. Other arguments and errors as `sweep`.

    Args:
        errors: why runs ended early, by name.
        started: when the sweep did, by the monotonic clock.
    """
    waiting = [p for p in planned if p.run.name not in errors and not _is_done(data.folder / p.run.name)]
    passes = plan_passes(waiting, data.caches, data.samples, memory_bytes=memory_bytes, on_note=data.on_note)
    nbytes: list[int] = []

    def result() -> SweepResult:
        rows = tuple(_row(run, data.folder / run.name, errors.get(run.name)) for run in data.runs)
        return SweepResult(
            runs=rows,
            groups=tuple(_groups(rows)),
            passes=tuple(tuple(p.run.name for p in part.runs) for part in passes),
            sample_nbytes=tuple(nbytes),
            seconds=time.monotonic() - started,
        )

    out, cache = data.writer.out, data.caches[0]
    found = _write(out, result())
    with StopRequests() as stop:
        for number, part in enumerate(passes, start=1):
            together = all_reads([p.reads for p in part.runs])
            nbytes.append(cache.buffers(slots=1, reads=together).nbytes)
            with progress(f"sweep pass {number}/{len(passes)}, {len(part.runs)} heads") as on_step:
                errors |= _train(part, together, data, stop=stop, on_step=on_step)
            data.writer.check()
            found = _write(out, result())
    return found


def read_sweep(out: Path) -> SweepResult:
    """Read what a sweep came to, so far. Raises: UsageError where there is none."""
    try:
        content = json.loads((out / SWEEP_NAME).read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise UsageError(f"{out / SWEEP_NAME}: of another format; this evl-cache reads format {_FORMAT}")
        return SweepResult(
            runs=tuple(SweepRow(**row) for row in content["runs"]),
            groups=tuple(SweepGroup(**group) for group in content["groups"]),
            passes=tuple(tuple(part) for part in content["passes"]),
            sample_nbytes=tuple(content["sample_nbytes"]),
            seconds=content["seconds"],
        )
    except OSError as error:
        raise UsageError(f"{out}: no sweep there ({error.strerror}); expected what sweep wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{out / SWEEP_NAME}: not what sweep writes ({error})") from error


def _begin(out: Path, runs: Sequence[SweepRun], *, resume: bool) -> dict[str, str]:
    """Say why runs of the sweep to go on with ended early, by name. Raises: UsageError where it is another sweep."""
    if not resume:
        if (out / SWEEP_NAME).exists():
            raise UsageError(f"{out} holds a sweep already; use --resume, or another --out")
        return {}
    before = read_sweep(out)
    mine = {run.name: _lasting(asdict(run.options)) for run in runs}
    theirs = {row.name: _lasting(row.options) for row in before.runs}
    if json.loads(json.dumps(mine)) != theirs:
        differing = sorted({name for name in mine.keys() | theirs if mine.get(name) != theirs.get(name)})
        raise UsageError(
            f"{out}: --resume with other runs ({', '.join(differing[:3])}, …); use the sweep's own grid, or another --out"
        )
    return {row.name: row.error or "" for row in before.runs if row.status == "diverged"}


def _lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in OPERATIONAL}


def _is_done(folder: Path) -> bool:
    return (folder / RunFile.RESULT).exists() and (folder / RunFile.CONFIG).exists()


def _planned(run: SweepRun, train_cache: FeatureCache) -> PlannedRun:
    """Add what a run reads. Raises: UsageError, before anything is trained, for a head that the cache's layers do not fit."""
    blocks = shuffle_blocks(run.options, train_cache, resumed=None)
    run = replace(run, options=replace(run.options, shuffle_blocks=blocks))
    reads = training_reads(run.options, train_cache.spec)
    nbytes = train_cache.buffers(slots=1, reads=reads).nbytes
    return PlannedRun(run=run, reads=reads, sample_nbytes=nbytes)


@giving_back_memory
def _train(
    one: SharedRuns, together: Reads, data: _Data, *, stop: StopRequests, on_step: OnPassStep
) -> dict[str, str]:
    """Train the runs of one pass. Returns: why runs ended early, by name."""
    options = one.runs[0].run.options
    loaders = make_loaders(
        data.caches, data.samples, together, options, Processes(), kept_nbytes=one.kept_nbytes
    )
    training = SweepPass(one.runs, together, *loaders, folder=data.folder, stop=stop, writer=data.writer)
    training.run(on_step)
    return {member.run.name: member.error for member in training.members if member.error is not None}


def _row(run: SweepRun, folder: Path, error: str | None) -> SweepRow:
    """Return the row of a run, from what its directory says."""
    figures: dict[str, Any] = {}
    if error is None and _is_done(folder):
        found = json.loads((folder / RunFile.RESULT).read_text(encoding="utf-8"))
        figures = {name: found[name] for name in ("top1", "top5", "parameters", "ms_per_step")}
    status = "diverged" if error is not None else "done" if figures else "waiting"
    options = asdict(run.options)
    return SweepRow(name=run.name, group=run.group, status=status, options=options, error=error, **figures)


def _groups(rows: Sequence[SweepRow]) -> list[SweepGroup]:
    """Average the runs that are done over seeds; the best group comes first, equals by name."""
    by_group: dict[str, list[SweepRow]] = {}
    for row in rows:
        if row.status == "done":
            by_group.setdefault(row.group, []).append(row)
    groups = [
        SweepGroup(
            group=name,
            runs=len(members),
            top1=statistics.mean(row.top1 or 0.0 for row in members),
            deviation=statistics.stdev(row.top1 or 0.0 for row in members) if len(members) > 1 else None,
            top5=statistics.mean(row.top5 or 0.0 for row in members),
            parameters=members[0].parameters or 0,
            ms_per_step=statistics.mean(row.ms_per_step or 0.0 for row in members),
        )
        for name, members in by_group.items()
    ]
    return sorted(groups, key=lambda group: (-group.top1, group.group))


def _write(out: Path, result: SweepResult) -> SweepResult:
    write_json(out / SWEEP_NAME, {"format": _FORMAT, **asdict(result)})
    return result
