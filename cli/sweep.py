"""`evl-cache sweep`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evl_cache.errors import UsageError
from evl_cache.notation import command_line
from evl_cache.progress_lines import step_progress

from .cache_flags import (
    CacheFlags,
    Flag,
    add_flags,
    cache_flags,
    device_flag,
    gigabytes,
    gigabytes_flag,
    json_flag,
    path_flag,
    precision_flag,
    read_threads_flag,
    trust_flag,
)
from .common import Command, Function, default_device, given_command, print_json, say, say_outage

if TYPE_CHECKING:
    from evl_cache.sweep.account import SweepResult
    from evl_cache.sweep.grid import SweepRun
    from evl_cache.sweep.shared_pass import OnPassStep

EXAMPLES = """
evl-cache sweep --dataset k400 --head decoder1,decoder4,linear --seed 0,1,2 --epochs 10
evl-cache sweep --cache caches/mine --val-clips fold1.txt --temporal all,none --lr 1e-3,3e-4 --out runs/a
evl-cache sweep grid.toml --dataset folder --out runs/ablation
"""
# Options with several values, and what a value is.
_AXES: Mapping[str, tuple[type[str] | type[float] | type[int], str, str]] = {
    "head": (str, "NAME,…", "decoderN, linear, mlap, … [decoder4]."),
    "temporal": (str, "WHICH,…", "all, none, conv, no-conv, … [all]."),
    "lr": (float, "LR,…", "[4e-4]"),
    "weight_decay": (float, "W,…", "AdamW's pull of weights to zero [0.05]."),
    "dropout": (float, "P,…", "Share of features dropped [0.5]."),
    "seed": (int, "N,…", "Of start and dropout; one clip order for all [0]."),
    "epochs": (int, "N,…", "[30, unless --steps]"),
    "steps": (int, "N,…", "Length in optimiser steps instead."),
    "batch": (int, "N,…", "Samples of a step [64]."),
    "warmup_steps": (int, "N,…", "Linear, from zero [0]."),
    "label_smoothing": (float, "P,…", "[0]"),
    "ema": (float, "DECAY,…", "Averaged weights [off]."),
    "grad_clip": (float, "NORM,…", "Of all gradients together [off]."),
}


def _sweep_flags(function: Function) -> Function:
    """What is swept over, from which caches, and where to."""
    axes = [
        click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=text)
        for name, (_, metavar, text) in _AXES.items()
    ]
    kind = click.Path(path_type=Path, exists=True, dir_okay=False)
    flags: list[Flag[Function]] = [
        click.argument("grid", type=kind, required=False),
        cache_flags,
        *axes,
        click.option(
            "--head-layers", multiple=True, metavar="9-12", help="Not the last layers; again for other ones."
        ),
        precision_flag,
        path_flag("--out", "Directory of the sweep [a new one under runs/]."),
        click.option("--resume", is_flag=True, help="Go on with the sweep in --out."),
        click.option("--save-every-steps", type=int, metavar="N", help="The last states [every epoch]."),
        click.option("--memory", metavar="GB", help="Most for heads trained at once [0.7 of what is free]."),
        gigabytes_flag("--cache-in-ram", "Keep samples once read."),
        read_threads_flag,
        trust_flag,
        device_flag,
        json_flag,
    ]
    return add_flags(function, flags)


@dataclass(frozen=True, kw_only=True)
class SweepFlags(CacheFlags):
    """The values of sweep's options, as the command line has them. `axes`: of the options with several values."""

    head_layers: tuple[str, ...]
    memory: str | None
    axes: Mapping[str, str | None]

    def given_axes(self) -> dict[str, list[str | float]]:
        """The axes given, with their values. Raises: UsageError for a value that is none."""
        axes: dict[str, list[str | float]] = {}
        for name, (kind, _, _) in _AXES.items():
            text = self.axes[name]
            if text is None:
                continue
            try:
                axes[name] = [kind(part) for part in text.split(",")]
            except ValueError as error:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} {text!r}; expected {kind.__name__} values, parted by commas"
                ) from error
        return axes | ({"head_layers": list(self.head_layers)} if self.head_layers else {})

    def common(self, device: str) -> dict[str, str | int | None]:
        """Options of TrainOptions that are the same for all runs."""
        keep_bytes = gigabytes("--cache-in-ram", self.cache_in_ram)
        return {
            "device": device,
            "precision": self.precision_on(device),
            "save_every_steps": self.save_every_steps,
            "keep_in": None if self.cache_in_ram is None else "ram",
            "keep_bytes": keep_bytes,
            "read_threads": self.read_threads,
        }


@click.command(cls=Command, name="sweep", examples=EXAMPLES)
@_sweep_flags
def command(grid: Path | None, **given: Any) -> int:
    """Train many heads in one pass over a cache: every combination of options with several values.

    Each batch is read, moved and decoded once for all heads; each head ends as its own `train` would. GRID is a TOML
    file (docs/sweeps.md) with more than the options can say. Leaves a run directory for each, and sweep.json.
    """
    from evl_cache.processes import Interrupted
    from evl_cache.sweep.grid import expand, read_grid

    values = {name: given.pop(name) for name in _AXES}
    flags = SweepFlags(**given, axes=values)
    axes = flags.given_axes()
    grids = [axes] if grid is None else [{**table, **axes} for table in read_grid(grid)]
    runs = expand(grids, flags.common(default_device(flags.device)))
    try:
        return _sweep(flags, runs)
    except Interrupted as stop:
        say(f"error: {stop}", err=True)
        return 128 + stop.signal_number


def _sweep(flags: SweepFlags, runs: Sequence[SweepRun]) -> int:
    from dataclasses import asdict

    from evl_cache.runs import new_run_directory, removed_if_empty
    from evl_cache.sweep import sweep
    from evl_cache.train.needs import needs_of

    data = flags.find(needs_of([run.options for run in runs]))
    out = flags.out or new_run_directory(data.train.name, "sweep")
    say(f"{data.train.name}: {len(runs)} runs -> {out}", err=True)
    with nullcontext() if flags.out else removed_if_empty(out):
        result = sweep(
            data.train,
            data.val,
            runs=runs,
            out=out,
            train_clips=data.train_rows,
            val_clips=data.val_rows,
            resume=flags.resume,
            memory_bytes=gigabytes("--memory", flags.memory),
            progress=_progress,
            on_wait=say_outage,
            on_note=say_outage,
            command=given_command(),
        )
    page = _report(out, result)
    if flags.as_json:
        print_json({"sweep": str(out), **asdict(result)})
    else:
        _show(out, result)
        say(page)
    return 3 if any(row.status == "diverged" for row in result.runs) else 0


@contextmanager
def _progress(description: str) -> Iterator[OnPassStep]:
    with step_progress(description) as line:

        def on_step(done: int, total: int, heads: int) -> None:
            line(done, total, None, heads=heads)

        yield on_step


def _report(out: Path, result: SweepResult) -> str:
    """Write the report where matplotlib is there and a run is done. Returns: a line that says where, or how."""
    from importlib.util import find_spec

    from evl_cache.report.data import gather
    from evl_cache.report.page import write_report_page

    if not result.groups:
        return "no run is done: no report"
    if find_spec("matplotlib") is None:
        command = command_line(("evl-cache", "report"), str(out)) or "evl-cache report on it"
        return f"for a page with plots: pip install 'evl-cache[report]', then {command}"
    return f"{write_report_page(gather([out]), out / 'report').page}: open it in a browser"


def _show(out: Path, result: SweepResult) -> None:
    """The table, the best first; then what ended early."""
    from evl_cache.runs import spread_text

    width = max((len(group.group) for group in result.groups), default=4)
    say(f"{'':{width}}   top-1 %                   top-5 %  parameters  ms a step  runs")
    for g in result.groups:
        spread = spread_text(g.deviation, g.top1_interval, digits=2)
        say(
            f"{g.group:{width}}  {g.top1:6.2f}{spread:18}  {g.top5:6.2f}  {g.parameters:12,}  {g.ms_per_step:9.1f}  {g.runs:4}"
        )
    if result.groups:
        say("± over seeds; of one run: 95 % interval over the validation clips (Wilson)")
    for row in result.runs:
        if row.status == "diverged":
            say(f"{row.name}: {row.error}", err=True)
    say(f"{out}: {len(result.passes)} pass{'es' if len(result.passes) != 1 else ''}, {result.seconds:.1f} s")
