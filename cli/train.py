"""`evl-cache train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evl_cache.errors import UsageError
from evl_cache.extract_options import Role, options_with
from evl_cache.progress_lines import StepProgress, step_progress

from .common import default_device, given_command, print_json, say, say_failure, say_outage
from .extract_flags import decoding_of, make_request, say_read
from .training_flags import TrainCommand, TrainFlags, refuse_online_options, train_flags

if TYPE_CHECKING:
    from evl_cache.processes import Processes
    from evl_cache.train import TrainOptions, TrainResult

_MOST_FAILURES_SAID = 5
_MOST_TIMEOUT_S = 1e8  # three years
_DECODING = ("decoder", "tolerate_bad_frames", "clip_timeout")
EXAMPLES = """
evl-cache train --dataset folder --head decoder4 --no-temporal-conv --no-temporal-cross-attention --lr 1e-3
evl-cache train --cache caches/mine --val-clips held-out.txt --head decoder2 --epochs 20 --out runs/fold1
"""


@click.command(cls=TrainCommand, name="train", examples=EXAMPLES)
@train_flags
def command(**given: Any) -> int:
    """\b
    Train a head from a cache, without videos or the backbone.
    torchrun --nproc-per-node N -m evl_cache_cli train … uses N devices.
    """
    from evl_cache.processes import Interrupted, ToldElsewhere, processes_of_environment

    of_videos = {option.parameter: given.pop(option.parameter) for option in options_with(Role.ONLINE)}
    flags = TrainFlags(**given, of_videos=of_videos)
    device = default_device(flags.device_again())
    if not 0 < flags.rank_timeout <= _MOST_TIMEOUT_S:
        raise UsageError(
            f"--rank-timeout {flags.rank_timeout}; expected seconds, above 0 and at most {_MOST_TIMEOUT_S:.0e}"
        )
    try:
        with processes_of_environment(device, timeout_s=flags.rank_timeout) as processes:
            return _train(flags, flags.train_options(device), processes)
    except Interrupted as stop:
        say(f"error: {stop}", err=True)
        return 128 + stop.signal_number
    except ToldElsewhere:
        return 2


def _train(flags: TrainFlags, options: TrainOptions, processes: Processes) -> int:
    run = _online if flags.online else _cached
    out, status, result = run(flags, options, processes)
    if not processes.place.is_first:
        return status
    from evl_cache.runs import spread_text, wilson_interval
    from evl_cache.runs.tables import worst_classes
    from evl_cache.train.again import has_the_same_head

    is_same = None if flags.again is None else has_the_same_head(flags.again, out)
    top1, top5 = (wilson_interval(percent, result.val_clips) for percent in (result.top1, result.top5))
    if flags.as_json:
        from dataclasses import asdict

        intervals = {"top1_interval": top1, "top5_interval": top5}
        print_json({"run": str(out), **asdict(result), **intervals, "is_same_head": is_same})
        return status
    if is_same is not None:
        say(
            f"{out}: its head is {'the same, bit for bit, as' if is_same else 'not that'} of {flags.again}",
            err=True,
        )
    say(
        f"{out}: top-1 {result.top1:.2f} %{spread_text(None, top1)}, top-5 {result.top5:.2f} % of "
        f"{result.val_clips} clips; "
        f"best {result.best_top1:.2f} % in epoch {result.best_epoch}; "
        f"{result.epochs} epochs, {result.clips_per_s:.1f} clips/s, {result.seconds:.1f} s"
    )
    for row in worst_classes(out):
        instead = f", mostly taken for {row.mistaken_for}" if row.mistaken_for else ""
        say(f"  {row.top1:6.2f} % of {row.clips} clips: {row.name}{instead}")
    return status


def _cached(flags: TrainFlags, options: TrainOptions, processes: Processes) -> tuple[Path, int, TrainResult]:
    from evl_cache.train import train
    from evl_cache.train.needs import needs_of

    refuse_online_options()
    is_first = processes.place.is_first
    if flags.again is None:
        data = flags.find(needs_of([options]), is_told=is_first)
    else:
        data = flags.find_again(is_told=is_first)
        if is_first:
            _tell_what_differs(flags, options, processes)
    with _out(flags, options, data.train.name, processes) as out, _progress(options, processes) as line:
        result = train(
            data.train,
            data.val,
            options=options,
            out=out,
            train_clips=data.train_rows,
            val_clips=data.val_rows,
            resume=flags.resume,
            processes=processes,
            on_step=line,
            on_bottleneck=line.note_bottleneck,
            on_wait=say_outage,
            on_note=say_outage,
            command=given_command(),
        )
    return out, 0, result


def _online(flags: TrainFlags, options: TrainOptions, processes: Processes) -> tuple[Path, int, TrainResult]:
    from evl_cache.live.train import train_online

    if flags.dataset is None or flags.cache is not None or flags.val_cache is not None:
        raise UsageError("--online reads videos: give --dataset and --root, as for extract, and no cache")
    failed: list[tuple[str, str]] = []
    how = decoding_of(options.device, *(flags.of_videos[name] for name in _DECODING))
    name = f"{flags.dataset}-online"
    with _out(flags, options, name, processes) as out, _progress(options, processes) as line:
        result = train_online(
            make_request({"dataset": flags.dataset, **flags.of_videos}, pixels=how["decoding"].pixels),
            options=options,
            out=out,
            train_names=flags.train_names,
            val_names=flags.val_names,
            resume=flags.resume,
            workers=flags.of_videos["decode_workers"],
            **how,
            on_read=say_read if processes.place.is_first else lambda read: None,
            on_step=line,
            on_bottleneck=line.note_bottleneck,
            on_failure=lambda clip, reason: failed.append((clip, reason)),
            on_outage=say_outage,
            on_wait=say_outage,
            processes=processes,
            command=given_command(),
        )
    for clip, reason in failed[:_MOST_FAILURES_SAID]:
        say_failure(clip, reason)
    if len(failed) > _MOST_FAILURES_SAID:
        say(f"{len(failed)} clips failed; the first {_MOST_FAILURES_SAID} are named", err=True)
    return out, 3 if result.skipped_clips else 0, result


def _tell_what_differs(flags: TrainFlags, options: TrainOptions, processes: Processes) -> None:
    """Say on stderr with what a run is done again that it was not done with: its losses may differ in the last digits."""
    from evl_cache.processes import training_environment
    from evl_cache.train.again import not_as_it_was

    now = training_environment(options.device, options.precision, processes.place, None)
    if others := not_as_it_was(flags.run_again, now):
        say(f"note: {flags.again} had {'; '.join(others)}: losses may differ by rounding", err=True)


def _progress(options: TrainOptions, processes: Processes) -> AbstractContextManager[StepProgress]:
    return step_progress(f"train {options.head}", shown=processes.place.is_first)


@contextmanager
def _out(flags: TrainFlags, options: TrainOptions, name: str, processes: Processes) -> Iterator[Path]:
    """The run directory; the first process makes a new one for all, which goes again if nothing is written there."""
    from evl_cache.runs import new_run_directory, removed_if_empty

    is_first = processes.place.is_first
    made = flags.out is None
    out = flags.out or processes.on_first(
        lambda: new_run_directory(name, options.head), "while choosing the run directory"
    )
    with removed_if_empty(out) if made and is_first else nullcontext():
        if is_first:
            say(f"{name} -> {out}", err=True)
        yield out
