"""`evl-cache train`."""

from pathlib import Path
from typing import Any

import click

from .common import Command, default_device, existing_lines, print_json, step_progress

EXAMPLES = """
evl-cache train --dataset folder --head decoder4
evl-cache train --cache caches/mine --val-clips held-out.txt --head decoder2 --epochs 20 --out runs/fold1
evl-cache train --dataset folder --no-temporal-conv --no-temporal-cross-attention --lr 1e-3
"""


@click.command(cls=Command, name="train", examples=EXAMPLES)
@click.option(
    "--dataset", help="Find the train and validation caches of this data set under $EVL_CACHE_ROOT."
)
@click.option("--cache", type=click.Path(path_type=Path), help="Or: the training cache,")
@click.option(
    "--val-cache",
    type=click.Path(path_type=Path),
    help="and the validation cache [the same, with --val-clips].",
)
@click.option(
    "--train-clips",
    type=click.Path(path_type=Path, exists=True),
    help="Ids or paths, a line each [all but val].",
)
@click.option(
    "--val-clips", type=click.Path(path_type=Path, exists=True), help="Ids or paths, a line each [all]."
)
@click.option(
    "--head",
    default="decoder4",
    show_default=True,
    metavar="decoderN",
    help="Reads the last N cached layers.",
)
@click.option("--head-layers", metavar="9-12", help="Other layers than the last.")
@click.option("--no-temporal-conv", is_flag=True, help="Without the temporal convolution.")
@click.option("--no-temporal-pos-embed", is_flag=True, help="Without the temporal position embedding.")
@click.option("--no-temporal-cross-attention", is_flag=True, help="Without motion from adjacent-frame maps.")
@click.option("--epochs", type=int, help="[30, unless --steps]")
@click.option("--steps", type=int, help="Length in optimiser steps instead.")
@click.option("--batch", type=int, default=64, show_default=True, help="Samples of a step.")
@click.option(
    "--accumulate", type=int, default=1, show_default=True, help="Forward passes a step is split into."
)
@click.option("--lr", type=float, default=4e-4, show_default=True, help="Peak; cosine to zero.")
@click.option("--warmup-steps", type=int, default=0, show_default=True)
@click.option("--weight-decay", type=float, default=0.05, show_default=True)
@click.option("--dropout", type=float, default=0.5, show_default=True)
@click.option(
    "--precision", type=click.Choice(["float32", "float16", "bfloat16"]), help="[bfloat16 on a GPU]"
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [a new one under runs/].")
@click.option("--resume", is_flag=True, help="Go on from the last state in --out.")
@click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(**given: Any) -> int:
    """Train a head from a cache, without videos or the backbone."""
    from evl_cache.catalog import find_training_caches, next_run_directory, split_clips
    from evl_cache.spec import parse_layers
    from evl_cache.train import TrainOptions, train

    layers = None if given["head_layers"] is None else parse_layers(given["head_layers"])
    modules: dict[str, Any] = {
        name: not given[f"no_{name}"]
        for name in ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
    }
    train_cache, val_cache = find_training_caches(
        given["dataset"],
        given["cache"],
        given["val_cache"],
        head=given["head"],
        head_layers=layers,
        needs_maps=modules["temporal_cross_attention"],
        same_cache_for_val=given["val_clips"] is not None,
    )
    device = default_device(given["device"])
    train_rows, val_rows = split_clips(
        train_cache,
        val_cache,
        train_names=None if given["train_clips"] is None else existing_lines(given["train_clips"]),
        val_names=None if given["val_clips"] is None else existing_lines(given["val_clips"]),
    )
    same = "head epochs steps batch accumulate lr warmup_steps weight_decay dropout seed"
    values: dict[str, Any] = {name: given[name] for name in same.split()}
    if values["epochs"] is None and values["steps"] is None:
        values["epochs"] = 30
    precision = given["precision"] or ("float32" if device == "cpu" else "bfloat16")
    options = TrainOptions(**values, **modules, head_layers=layers, precision=precision, device=device)
    out = given["out"] or next_run_directory(train_cache.path.name, given["head"])
    click.echo(f"{train_cache.path} -> {out}", err=True)
    with step_progress(f"train {given['head']}") as on_step:
        result = train(
            train_cache,
            val_cache,
            options=options,
            out=out,
            train_clips=train_rows,
            val_clips=val_rows,
            resume=given["resume"],
            on_step=on_step,
        )
    if given["as_json"]:
        from dataclasses import asdict

        print_json({"run": str(out), **asdict(result)})
    else:
        click.echo(
            f"{out}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {result.val_clips} clips; "
            f"{result.epochs} epochs, {result.clips_per_s:.1f} clips/s, {result.seconds:.1f} s"
        )
    return 0
