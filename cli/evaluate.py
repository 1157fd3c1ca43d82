"""`evl-cache eval`."""

from dataclasses import asdict
from pathlib import Path

import click

from .cache_flags import run_precision_flag
from .common import Command, default_device, existing_lines, print_json, say, tell_rules

EXAMPLES = """
evl-cache eval --cache caches/mine --run runs/fold1
evl-cache eval --cache caches/mine --run runs/fold1 --clips held-out.txt --json
"""


@click.command(cls=Command, name="eval", examples=EXAMPLES)
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Cache to score on.")
@click.option(
    "--run", type=click.Path(path_type=Path), required=True, help="Run directory of train or import-head."
)
@click.option("--best", is_flag=True, help="The head of the run's best epoch, not of its last.")
@click.option(
    "--clips", type=click.Path(path_type=Path, exists=True), help="Ids or paths, a line each [all]."
)
@click.option(
    "--batch", type=click.IntRange(1), default=64, show_default=True, help="Samples of a forward pass."
)
@run_precision_flag
@click.option(
    "--read-threads", type=click.IntRange(1), metavar="N", help="That read and decode [as many as suit]."
)
@click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    *,
    cache: Path,
    run: Path,
    best: bool,
    clips: Path | None,
    batch: int,
    precision: str | None,
    read_threads: int | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Score a run's head on a cache: softmax averaged over a clip's views, top-1 and top-5."""
    from evl_cache.clips import select
    from evl_cache.runs import read_run_config, spread_text
    from evl_cache.runs.evaluate import evaluate
    from evl_cache.spec import CacheSpec
    from evl_cache.store import FeatureCache

    opened = FeatureCache(cache)
    rows = None if clips is None else select(opened.clips, existing_lines(clips), source=str(clips))
    if (features := read_run_config(run).features) is not None:
        tell_rules(run, CacheSpec.from_json(features).frame_rule, opened.place, opened.frame_rule)
    device = default_device(device)
    result = evaluate(
        run,
        opened,
        clips=rows,
        batch=batch,
        device=device,
        precision=precision,
        threads=read_threads,
        best=best,
        on_note=lambda message: say(f"note: {message}", err=True),
    )
    if result.clips_trained_on:
        say(
            f"note: {run} was trained on {result.clips_trained_on} of these {result.val_clips} clips, by their names: the "
            "accuracy of them says little of others",
            err=True,
        )
    if as_json:
        print_json({"run": str(run), "cache": opened.place, **asdict(result)})
    else:
        whose = " that the run was validated on" if result.scored_on == "validation" else ""
        say(
            f"top-1 {result.top1:.2f} %{spread_text(None, result.top1_interval)}, top-5 {result.top5:.2f} % of "
            f"{result.val_clips} clips{whose}; "
            f"loss {result.loss:.4f}, {result.clips_per_s:.1f} samples/s"
        )
    return 0
