"""`evl-cache train`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from evl_cache.errors import UsageError
from evl_cache.progress_lines import step_progress

from .common import default_device, existing_lines, print_json, tell_found
from .extract import make_request
from .train_options import TrainCommand, make_train_options, refuse_online_options, train_options

EXAMPLES = """
evl-cache train --dataset folder --head decoder4
evl-cache train --cache caches/mine --val-clips held-out.txt --head decoder2 --epochs 20 --out runs/fold1
evl-cache train --dataset folder --no-temporal-conv --no-temporal-cross-attention --lr 1e-3
"""


@click.command(cls=TrainCommand, name="train", examples=EXAMPLES)
@train_options
def command(**given: Any) -> int:
    """Train a head from a cache, without videos or the backbone.

    torchrun --nproc-per-node N -m evl_cache_cli train … uses N devices.
    """
    from evl_cache.processes.group import ToldElsewhere, local_device, processes_of_environment
    from evl_cache.processes.stop_requests import Interrupted

    device = default_device(local_device(default_device(given["device"])))
    try:
        with processes_of_environment(device, timeout_s=given["rank_timeout"]) as processes:
            return _train(given, make_train_options(given, device), processes)
    except Interrupted as stop:
        click.echo(f"error: {stop}", err=True)
        return 128 + stop.signal_number
    except ToldElsewhere:
        return 2


def _train(given: dict[str, Any], options: Any, processes: Any) -> int:
    names = {
        side: None if given[option] is None else existing_lines(given[option])
        for side, option in (("train_names", "train_clips"), ("val_names", "val_clips"))
    }
    run = _online if given["online"] else _cached
    progress = step_progress(f"train {options.head}") if processes.is_first else nullcontext(None)
    out, status, result = run(given, options, names, progress, processes)
    if not processes.is_first:
        return status
    if given["as_json"]:
        from dataclasses import asdict

        print_json({"run": str(out), **asdict(result)})
        return status
    from evl_cache.runs.tables import worst_classes

    click.echo(
        f"{out}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {result.val_clips} clips; "
        f"best {result.best_top1:.2f} % in epoch {result.best_epoch}; "
        f"{result.epochs} epochs, {result.clips_per_s:.1f} clips/s, {result.seconds:.1f} s"
    )
    for row in worst_classes(out):
        instead = f", mostly taken for {row.mistaken_for}" if row.mistaken_for else ""
        click.echo(f"  {row.top1:6.2f} % of {row.clips} clips: {row.name}{instead}")
    return status


def _cached(
    given: dict[str, Any], options: Any, names: dict[str, Any], progress: Any, processes: Any
) -> tuple[Path, int, Any]:
    from evl_cache.batches.folds import split_clips
    from evl_cache.caches.pairing import find_training_caches
    from evl_cache.train.needs import needs_of
    from evl_cache.train.stage import train

    refuse_online_options()
    caches = find_training_caches(
        given["dataset"],
        given["cache"],
        given["val_cache"],
        needs=needs_of([options]),
        same_cache_for_val=given["val_clips"] is not None,
        trust=given["trust"],
        on_found=tell_found if processes.is_first else lambda train, val: None,
    )
    train_rows, val_rows = split_clips(*caches, **names)
    out = _out(given, caches[0].name, processes)
    with progress as on_step:
        result = train(
            *caches,
            options=options,
            out=out,
            train_clips=train_rows,
            val_clips=val_rows,
            resume=given["resume"],
            processes=processes,
            **_callbacks(on_step),
        )
    return out, 0, result


def _online(
    given: dict[str, Any], options: Any, names: dict[str, Any], progress: Any, processes: Any
) -> tuple[Path, int, Any]:
    from evl_cache.live.train import train_online

    if given["dataset"] is None or given["cache"] is not None or given["val_cache"] is not None:
        raise UsageError("--online reads videos: give --dataset and --root, as for extract, and no cache")
    # The recipe is training's.
    storage = {"tokens": "fp16", "maps": "fp16", "codec": "default", "cache": None, "recipe": None}
    request = make_request({**given, **storage})
    out = _out(given, f"{given['dataset']}-online", processes)
    failed: list[tuple[str, str]] = []
    with progress as on_step:
        result = train_online(
            request,
            options=options,
            out=out,
            **names,
            resume=given["resume"],
            workers=given["decode_workers"],
            on_failure=lambda clip, reason: failed.append((clip, reason)),
            processes=processes,
            **_callbacks(on_step),
        )
    for clip, reason in failed[:5]:
        click.echo(f"failed: {clip}: {reason}", err=True)
    return out, 3 if result.skipped_clips else 0, result


def _out(given: dict[str, Any], name: str, processes: Any) -> Path:
    """The run directory; the first process chooses a new one for all."""
    from evl_cache.runs.directory import next_run_directory

    out: Path = given["out"] or processes.on_first(
        lambda: next_run_directory(name, given["head"]), "while choosing the run directory"
    )
    if processes.is_first:
        click.echo(f"{name} -> {out}", err=True)
    return out


def _callbacks(on_step: Any) -> dict[str, Any]:
    return {} if on_step is None else {"on_step": on_step, "on_bottleneck": on_step.note_bottleneck}
