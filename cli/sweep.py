"""`evl-cache sweep`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from evl_cache.errors import UsageError
from evl_cache.progress_lines import step_progress

from .common import Command, default_device, existing_lines, print_json, tell_found

EXAMPLES = """
evl-cache sweep --dataset k400 --head decoder1,decoder4,linear --seed 0,1,2 --epochs 10
evl-cache sweep --cache caches/mine --val-clips fold1.txt --temporal all,none --lr 1e-3,3e-4 --out runs/a
evl-cache sweep grid.toml --dataset folder --out runs/ablation
"""
# Options with several values, and what a value is.
_AXES = {
    "head": (str, "NAME,…", "decoderN, linear, mlap, … [decoder4]."),
    "temporal": (str, "WHICH,…", "all, none, conv, no-conv, … [all]."),
    "lr": (float, "LR,…", "[4e-4]"),
    "weight_decay": (float, "W,…", "[0.05]"),
    "dropout": (float, "P,…", "[0.5]"),
    "seed": (int, "N,…", "Of start and dropout; one clip order for all [0]."),
    "epochs": (int, "N,…", "[30, unless --steps]"),
    "steps": (int, "N,…", "Length in optimiser steps instead."),
    "batch": (int, "N,…", "Samples of a step [64]."),
    "warmup_steps": (int, "N,…", "Linear, from zero [0]."),
    "label_smoothing": (float, "P,…", "[0]"),
    "ema": (float, "DECAY,…", "Averaged weights [off]."),
    "grad_clip": (float, "NORM,…", "Of all gradients together [off]."),
}


def _path(name: str, text: str, *, exists: bool = False) -> Any:
    kind = click.Path(path_type=Path, exists=exists)
    return click.option(name, type=kind, metavar="FILE" if exists else "PATH", help=text)


def _sweep_options(function: Any) -> Any:
    """What is swept over, from which caches, and where to."""
    axes = [
        click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=text)
        for name, (_, metavar, text) in _AXES.items()
    ]
    options = [
        click.argument("grid", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False),
        click.option("--dataset", metavar="NAME", help="Find its caches under $EVL_CACHE_ROOT."),
        _path("--cache", "Or: the training cache,"),
        _path("--val-cache", "and validation [same, with --val-clips]."),
        _path("--train-clips", "Ids or paths, a line each [all but val].", exists=True),
        _path("--val-clips", "Ids or paths, a line each [all].", exists=True),
        *axes,
        click.option(
            "--head-layers", multiple=True, metavar="9-12", help="Not the last layers; again for other ones."
        ),
        click.option("--precision", metavar="DTYPE", help="float32, float16, bfloat16 [GPU's default]."),
        _path("--out", "Directory of the sweep [a new one under runs/]."),
        click.option("--resume", is_flag=True, help="Go on with the sweep in --out."),
        click.option("--save-every-steps", type=int, metavar="N", help="The last states [every epoch]."),
        click.option("--memory", type=float, metavar="GB", help="Of a pass's heads [0.7 of what is free]."),
        click.option(
            "--cache-in-ram", metavar="[GB]", is_flag=False, flag_value="auto", help="Keep samples once read."
        ),
        click.option("--trust", is_flag=True, help="Do not check chunks against their marks."),
        click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N [the GPU, if any]."),
        click.option("--json", "as_json", is_flag=True, help="Report as JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=Command, name="sweep", examples=EXAMPLES)
@_sweep_options
def command(grid: Path | None, **given: Any) -> int:
    """Train many heads in one pass over a cache: every combination of options with several values.

    Each batch is read, moved and decoded once for all heads; each head ends as its own `train` would. GRID is a TOML
    file (docs/sweeps.md) with more than the options can say. Leaves a run directory for each, and sweep.json.
    """
    from evl_cache.processes.stop_requests import Interrupted
    from evl_cache.sweep.grid import expand, read_grid

    device = default_device(given["device"])
    axes = _given_axes(given)
    grids = [axes] if grid is None else [{**table, **axes} for table in read_grid(grid)]
    runs = expand(grids, _common(given, device))
    try:
        return _sweep(given, runs)
    except Interrupted as stop:
        click.echo(f"error: {stop}", err=True)
        return 128 + stop.signal_number


def _given_axes(given: dict[str, Any]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for name, (kind, _, _) in _AXES.items():
        if given[name] is None:
            continue
        try:
            axes[name] = [kind(part) for part in given[name].split(",")]
        except ValueError as error:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} {given[name]!r}; expected {kind.__name__} values, parted by commas"
            ) from error
    if given["head_layers"]:
        axes["head_layers"] = list(given["head_layers"])
    return axes


def _common(given: dict[str, Any], device: str) -> dict[str, Any]:
    amount = given["cache_in_ram"]
    try:
        keep_bytes = None if amount in (None, "auto") else int(float(amount) * 1e9)
    except ValueError as error:
        raise UsageError(f"--cache-in-ram {amount!r}; expected gigabytes, or nothing") from error
    return {
        "device": device,
        "precision": given["precision"] or ("float32" if device == "cpu" else "bfloat16"),
        "save_every_steps": given["save_every_steps"],
        "keep_in": None if amount is None else "ram",
        "keep_bytes": keep_bytes,
    }


def _sweep(given: dict[str, Any], runs: Any) -> int:
    from dataclasses import asdict

    from evl_cache.batches.folds import split_clips
    from evl_cache.caches.pairing import find_training_caches
    from evl_cache.runs.directory import next_run_directory
    from evl_cache.sweep import sweep
    from evl_cache.train.needs import needs_of

    names: dict[str, Any] = {
        side: None if given[option] is None else existing_lines(given[option])
        for side, option in (("train_names", "train_clips"), ("val_names", "val_clips"))
    }
    caches = find_training_caches(
        given["dataset"],
        given["cache"],
        given["val_cache"],
        needs=needs_of([run.options for run in runs]),
        same_cache_for_val=given["val_clips"] is not None,
        trust=given["trust"],
        on_found=tell_found,
    )
    train_rows, val_rows = split_clips(*caches, **names)
    out: Path = given["out"] or next_run_directory(caches[0].name, "sweep")
    click.echo(f"{caches[0].name}: {len(runs)} runs -> {out}", err=True)
    result = sweep(
        *caches,
        runs=runs,
        out=out,
        train_clips=train_rows,
        val_clips=val_rows,
        resume=given["resume"],
        memory_bytes=None if given["memory"] is None else int(given["memory"] * 1e9),
        progress=_progress,
    )
    page = _report(out, result)
    if given["as_json"]:
        print_json({"sweep": str(out), **asdict(result)})
    else:
        _show(out, result)
        click.echo(page)
    return 3 if any(row.status == "diverged" for row in result.runs) else 0


@contextmanager
def _progress(description: str) -> Iterator[Any]:
    with step_progress(description) as line:

        def on_step(done: int, total: int, heads: int) -> None:
            line(done, total, None, heads=heads)

        yield on_step


def _report(out: Path, result: Any) -> str:
    """Write the report where matplotlib is there and a run is done. Returns: a line that says where, or how."""
    from importlib.util import find_spec

    from evl_cache.report.data import gather
    from evl_cache.report.page import write_report_page

    if not result.groups:
        return "no run is done: no report"
    if find_spec("matplotlib") is None:
        return f"for a page with plots: pip install 'evl-cache[report]', then evl-cache report {out}"
    return f"{write_report_page(gather([out]), out / 'report').page}: open it in a browser"


def _show(out: Path, result: Any) -> None:
    """The table, the best first; then what ended early."""
    width = max((len(group.group) for group in result.groups), default=4)
    click.echo(f"{'':{width}}   top-1 %          top-5 %  parameters  ms a step  runs")
    for g in result.groups:
        spread = "" if g.deviation is None else f" ± {g.deviation:.2f}"
        click.echo(
            f"{g.group:{width}}  {g.top1:6.2f}{spread:9}  {g.top5:6.2f}  {g.parameters:12,}  {g.ms_per_step:9.1f}  {g.runs:4}"
        )
    for row in result.runs:
        if row.status == "diverged":
            click.echo(f"{row.name}: {row.error}", err=True)
    click.echo(
        f"{out}: {len(result.passes)} pass{'es' if len(result.passes) != 1 else ''}, {result.seconds:.1f} s"
    )
