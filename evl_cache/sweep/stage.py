"""Ablations in one pass: many heads trained together from one cache, each as a training of its own would train it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evl_cache.batches import samples_of_clips, served_samples
from evl_cache.canonical_json import json_text
from evl_cache.errors import UsageError
from evl_cache.processes import Processes, StopRequests, giving_back_memory
from evl_cache.runs import (
    RUNS_NAME,
    OnWait,
    RunFile,
    RunWriter,
    other_sides,
    read_run_config,
    samples_digest,
    writing,
)
from evl_cache.store import FeatureCache, Indices, Reads
from evl_cache.sweep.account import (
    SWEEP_NAME,
    SweepResult,
    groups_of,
    is_done,
    read_sweep,
    row_of,
    write_sweep,
)
from evl_cache.sweep.grid import SweepRun
from evl_cache.sweep.memory import SharedRuns, plan_passes
from evl_cache.sweep.shared_pass import OnPassStep, PlannedRun, SweepPass
from evl_cache.train import (
    OPERATIONAL,
    all_reads,
    check_caches,
    make_loaders,
    notes_of_sides,
    shuffle_blocks,
    training_reads,
)

ProgressOfPass = Callable[[str], AbstractContextManager[OnPassStep]]


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The runs as they were asked for, the caches and samples of both sides, where everything goes, and who may write there.

    Attributes:
        command: what asked for them, if it is known.
    """

    runs: Sequence[SweepRun]
    caches: tuple[FeatureCache, FeatureCache]
    samples: tuple[Any, Any]
    folder: Path
    writer: RunWriter
    on_note: Callable[[str], None]
    command: str | None


def sweep(
    train_cache: FeatureCache,
    val_cache: FeatureCache,
    *,
    runs: Sequence[SweepRun],
    out: str | Path,
    train_clips: Indices | None = None,
    val_clips: Indices | None = None,
    resume: bool = False,
    memory_bytes: int | None = None,
    progress: ProgressOfPass = lambda description: nullcontext(lambda done, total, heads: None),
    on_wait: OnWait = lambda message: None,
    on_note: Callable[[str], None] = lambda message: None,
    command: str | None = None,
) -> SweepResult:
    """Train every run and leave a run directory for each under `out`/runs, and `out`/sweep.json.

    Args:
        runs: from `sweep.grid.expand`.
        out: directory of the sweep.
        train_clips, val_clips: as `train` takes them.
        resume: go on with a sweep of the same runs.
        memory_bytes: most that heads and a batch's features may take together; other heads wait for a later pass.
        progress: opens the progress line of a pass.
        on_wait: told once, if it must first be seen whether a writer on another machine lives.
        on_note: told in a line where fewer samples are kept than was asked for, and of clips on both sides.
        command: the command line that called, without credentials; each run records it.

    Raises: UsageError where caches, heads and options do not fit each other, where `out` holds a sweep, or where
        another process writes it or one of its runs;
        Interrupted where a signal asked to stop, after every state was kept.
    """
    started, out = time.monotonic(), Path(out)
    samples = samples_of_clips(train_cache, train_clips), samples_of_clips(val_cache, val_clips)
    caches = train_cache, val_cache
    served = [served_samples(cache, rows) for cache, rows in zip(caches, samples, strict=True)]
    planned = [_planned(run, train_cache, val_cache) for run in runs]
    beside = [out / RUNS_NAME / run.name for run in runs]
    with writing(out, beside=beside, on_wait=on_wait) as writer:
        data = _Data(
            runs=runs,
            caches=caches,
            samples=samples,
            folder=out / RUNS_NAME,
            writer=writer,
            on_note=on_note,
            command=command,
        )
        errors, seconds = _begin(out, runs, resume=resume)
        _check_sides(data)
        for note in notes_of_sides(caches, served):
            on_note(note)
        return _in_passes(planned, data, errors, started - seconds, memory_bytes, progress)


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
        started: when the sweep did, by the monotonic clock, as if it had not been cut.
    """
    waiting = [p for p in planned if p.run.name not in errors and not is_done(data.folder / p.run.name)]
    passes = plan_passes(waiting, data.caches, data.samples, memory_bytes=memory_bytes, on_note=data.on_note)
    nbytes: list[int] = []

    def result() -> SweepResult:
        rows = tuple(row_of(run, data.folder / run.name, errors.get(run.name)) for run in data.runs)
        return SweepResult(
            runs=rows,
            groups=tuple(groups_of(rows, data.folder)),
            passes=tuple(tuple(p.run.name for p in part.runs) for part in passes),
            sample_nbytes=tuple(nbytes),
            seconds=time.monotonic() - started,
        )

    out, cache = data.writer.out, data.caches[0]
    found = write_sweep(out, result())
    with StopRequests() as stop:
        for number, part in enumerate(passes, start=1):
            together = all_reads([p.reads for p in part.runs])
            nbytes.append(cache.buffers(slots=1, reads=together).nbytes)
            with progress(f"sweep pass {number}/{len(passes)}, {len(part.runs)} heads") as on_step:
                try:
                    _train(part, together, data, errors, stop=stop, on_step=on_step)
                finally:  # also where it is stopped, for its seconds
                    data.writer.check()
                    found = write_sweep(out, result())
    return found


def _begin(out: Path, runs: Sequence[SweepRun], *, resume: bool) -> tuple[dict[str, str], float]:
    """Return why runs ended early, by name, and the seconds of the sweep so far. Raises: UsageError where it is another one."""
    if not resume:
        if (out / SWEEP_NAME).exists():
            raise UsageError(f"{out} holds a sweep already; use --resume, or another --out")
        return {}, 0.0
    before = read_sweep(out)
    mine = {run.name: _lasting(asdict(run.options)) for run in runs}
    theirs = {row.name: _lasting(row.options) for row in before.runs}
    if json.loads(json_text(mine)) != theirs:
        differing = sorted({name for name in mine.keys() | theirs if mine.get(name) != theirs.get(name)})
        raise UsageError(
            f"{out}: --resume with other runs ({', '.join(differing[:3])}, …); use the sweep's own grid, or another --out"
        )
    return {row.name: row.error or "" for row in before.runs if row.status == "diverged"}, before.seconds


def _check_sides(data: _Data) -> None:
    """Refuse to go on with runs of other caches or clips: means would be taken over both. Raises: UsageError."""
    folders = [folder for run in data.runs if ((folder := data.folder / run.name) / RunFile.CONFIG).exists()]
    if not folders:
        return
    now = {
        side: {
            "fingerprint": cache.fingerprint,
            "samples_sha256": samples_digest(rows[cache.is_valid[rows]]),
        }
        for side, cache, rows in zip(("train", "val"), data.caches, data.samples, strict=True)
    }
    for folder in folders:
        if others := other_sides(read_run_config(folder).caches, now):
            raise UsageError(
                f"{folder}: --resume with other {', '.join(others)}; use the sweep's own, or another --out"
            )


def _lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in OPERATIONAL}


def _planned(run: SweepRun, train_cache: FeatureCache, val_cache: FeatureCache) -> PlannedRun:
    """Add what a run reads. Raises: UsageError, before anything is trained, for a head that the caches do not fit."""
    blocks = shuffle_blocks(run.options, train_cache, resumed=None)
    run = replace(run, options=replace(run.options, shuffle_blocks=blocks))
    reads = training_reads(run.options, train_cache.spec)
    check_caches((train_cache, val_cache), [reads])
    sides = {"train": train_cache, "val": val_cache}
    nbytes = {side: cache.buffers(slots=1, reads=reads).nbytes for side, cache in sides.items()}
    return PlannedRun(run=run, reads=reads, sample_nbytes=nbytes)


@giving_back_memory
def _train(
    one: SharedRuns,
    together: Reads,
    data: _Data,
    errors: dict[str, str],
    *,
    stop: StopRequests,
    on_step: OnPassStep,
) -> None:
    """Train the runs of one pass. Args: errors: gets why runs ended early, by name, also where the pass is stopped."""
    options = one.runs[0].run.options
    loaders = make_loaders(
        data.caches, data.samples, together, options, Processes(), kept_nbytes=one.kept_nbytes
    )
    training = SweepPass(
        one.runs, together, *loaders, folder=data.folder, stop=stop, writer=data.writer, command=data.command
    )
    try:
        training.run(on_step)
    finally:
        errors |= {member.run.name: member.error for member in training.members if member.error is not None}
