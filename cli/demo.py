"""`evl-cache demo`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evl_cache.progress_lines import ClipProgress, extract_progress, step_progress

from .common import Command, default_device, print_json

if TYPE_CHECKING:
    from evl_cache.spec import CacheSpec

TOWERS = ("untrained", "evl-tiny")  # evl_cache.demo.TOWERS, which imports torch
EXAMPLES = """
evl-cache demo
evl-cache demo --out demo --json
evl-cache demo --tower evl-tiny
"""


@click.command(cls=Command, name="demo", examples=EXAMPLES)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep clips, caches and runs here [a temporary folder]."
)
@click.option(
    "--tower",
    type=click.Choice(TOWERS),
    default="untrained",
    show_default=True,
    help="Frozen: random weights made for motion, or the small pretrained one.",
)
@click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(out: Path | None, tower: str, device: str | None, as_json: bool) -> int:
    """Render clips, extract, train with and without temporal modules; needs no download.

    Eight classes that differ only in how things move: four motions and the same four played backwards.
    """
    from evl_cache.demo import demo_options, run_demo

    directory = out or Path(tempfile.mkdtemp(prefix="evl-cache-demo-"))
    try:
        with step_progress("train") as on_step:
            result = run_demo(
                directory,
                options=demo_options(tower, device=default_device(device)),
                progress=_progress,
                on_step=on_step,
                on_stage=lambda name: click.echo(f"{name} …", err=True),
            )
    finally:
        if out is None:
            shutil.rmtree(directory, ignore_errors=True)
    if as_json:
        print_json(asdict(result))
        return 0
    for stage, seconds in result.seconds.items():
        click.echo(f"{seconds:6.1f} s  {stage}")
    click.echo(f"{sum(result.seconds.values()):6.1f} s  in all")
    for text, trained in (("with", result.with_modules), ("without", result.without_modules)):
        click.echo(
            f"top-1 {trained.top1:5.1f} %  {text} temporal modules ({trained.val_clips} clips, {result.classes} classes)"
        )
    return 0


def _progress(spec: CacheSpec) -> AbstractContextManager[tuple[ClipProgress, Callable[[str], None]]]:
    return extract_progress(spec.num_clips, spec.split)
