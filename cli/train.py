"""`evl-cache train`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from evl_cache.errors import UsageError

from .common import Command, default_device, existing_lines, print_json, step_progress
from .extract import dataset_options, make_request

EXAMPLES = """
evl-cache train --dataset folder --head decoder4
evl-cache train --cache caches/mine --val-clips held-out.txt --head decoder2 --epochs 20 --out runs/fold1
evl-cache train --dataset folder --no-temporal-conv --no-temporal-cross-attention --lr 1e-3
"""
ONLINE = "root split annotations list model pretrained layers frames sampling stride views limit"
_ONLINE_ONLY = {*ONLINE.split(), "compute-dtype", "allow-missing", "decode-workers"}
_MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
_SAME = (
    "head epochs steps accumulate lr warmup_steps weight_decay grad_clip dropout label_smoothing ema seed "
    "save_every_steps"
)


class TrainCommand(Command):
    """With the options of extract that --online takes: they work, and are listed in one line of the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        carrier: Any = dataset_options(lambda: None)
        for option in carrier.__click_params__:
            if option.opts[0].removeprefix("--") in _ONLINE_ONLY:
                option.hidden = True
                self.params.append(option)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and what --online takes beside them."""
        super().format_options(ctx, formatter)
        with formatter.section("With --online, as extract --help says"):
            formatter.write_text(" ".join(f"--{name}" for name in ONLINE.split()))


class BatchSize(click.ParamType):
    """A number, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """int, or the word."""
        return value if value == "auto" else click.INT.convert(value, param, ctx)


def _gigabytes(name: str, help_text: str) -> Any:
    return click.option(name, metavar="[GB]", is_flag=False, flag_value="auto", help=help_text)


def _path(name: str, help_text: str, *, exists: bool = False) -> Any:
    kind = click.Path(path_type=Path, exists=exists)
    return click.option(name, type=kind, metavar="FILE" if exists else "PATH", help=help_text)


@click.command(cls=TrainCommand, name="train", examples=EXAMPLES)
@click.option("--dataset", metavar="NAME", help="Find its caches under $EVL_CACHE_ROOT.")
@_path("--cache", "Or: the training cache,")
@_path("--val-cache", "and validation [same, with --val-clips].")
@_path("--train-clips", "Ids or paths, a line each [all but val].", exists=True)
@_path("--val-clips", "Ids or paths, a line each [all].", exists=True)
@click.option("--recipe", metavar="k400|ssv2", help="Published settings; options given win.")
@click.option("--head", default="decoder4", metavar="decoderN", help="Reads the last N layers [decoder4].")
@click.option("--head-layers", metavar="9-12", help="Other layers than the last.")
@click.option("--no-temporal-conv", is_flag=True, help="Without the temporal convolution.")
@click.option("--no-temporal-pos-embed", is_flag=True, help="Without the position embedding.")
@click.option("--no-temporal-cross-attention", is_flag=True, help="Without motion from maps.")
@click.option("--epochs", type=int, metavar="N", help="[30, unless --steps]")
@click.option("--steps", type=int, metavar="N", help="Length in optimiser steps instead.")
@click.option("--batch", type=BatchSize(), help="Samples of a step; auto: most that fit [64]")
@click.option("--accumulate", type=int, metavar="N", help="Passes a step is split into [1].")
@click.option("--lr", type=float, metavar="LR", help="Peak; cosine to zero [4e-4].")
@click.option("--warmup-steps", type=int, metavar="N", help="Linear, from zero [0].")
@click.option("--weight-decay", type=float, metavar="W", help="[0.05]")
@click.option(
    "--decay-norms-and-biases/--no-decay-norms-and-biases",
    "decay_norms_and_biases",
    default=None,
    hidden=True,
)
@click.option("--grad-clip", type=float, metavar="NORM", help="Of all gradients together [off].")
@click.option("--dropout", type=float, metavar="P", help="[0.5]")
@click.option("--label-smoothing", type=float, metavar="P", help="[0]")
@click.option("--ema", type=float, metavar="DECAY", help="Validate and save averaged weights.")
@click.option("--precision", metavar="DTYPE", help="float32, float16, bfloat16 [GPU's default].")
@click.option("--seed", type=int, metavar="N", help="[0]")
@_path("--out", "Run directory [a new one under runs/].")
@click.option("--resume", is_flag=True, help="Go on from the last state in --out.")
@click.option("--save-every-steps", type=int, metavar="N", help="The last state [every epoch].")
@_gigabytes("--cache-in-ram", "Keep samples once read [half of what is free].")
@_gigabytes("--cache-on-device", "The same on the GPU.")
@click.option("--tensorboard", is_flag=True, help="Write its event files too.")
@click.option("--online", is_flag=True, help="No cache: the backbone live on videos.")
@click.option(
    "--rank-timeout", type=float, default=600.0, metavar="S", help="Of a process torchrun lost [600]."
)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N [the GPU, if any].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(**given: Any) -> int:
    """Train a head from a cache, without videos or the backbone.

    torchrun --nproc-per-node N -m evl_cache_cli train … uses N devices.
    """
    from evl_cache.distributed import ToldElsewhere, local_device, processes_of_environment
    from evl_cache.interruption import Interrupted

    device = default_device(local_device(default_device(given["device"])))
    try:
        with processes_of_environment(device, timeout_s=given["rank_timeout"]) as processes:
            return _train(given, _options(given, device), processes)
    except Interrupted as stop:
        click.echo(f"error: {stop}", err=True)
        return 128 + stop.signal_number
    except ToldElsewhere:
        return 2


def _options(given: dict[str, Any], device: str) -> Any:
    """The TrainOptions of the command line."""
    from evl_cache.spec import parse_layers
    from evl_cache.train_options import options_of

    places = {place: given[name] for place, name in (("ram", "cache_in_ram"), ("device", "cache_on_device"))}
    chosen = [place for place, amount in places.items() if amount is not None]
    if len(chosen) == 2:
        raise UsageError("--cache-in-ram and --cache-on-device; expected one of them at most")
    values = {name: given[name] for name in (*_SAME.split(), "batch", "decay_norms_and_biases")}
    return options_of(
        given["recipe"],
        {
            **values,
            **{name: not given[f"no_{name}"] for name in _MODULES},
            "head_layers": None if given["head_layers"] is None else parse_layers(given["head_layers"]),
            "precision": given["precision"] or ("float32" if device == "cpu" else "bfloat16"),
            "device": device,
            "keep_in": chosen[0] if chosen else None,
            "keep_bytes": _bytes(places[chosen[0]]) if chosen else None,
            "tensorboard": given["tensorboard"],
        },
    )


def _bytes(amount: str) -> int | None:
    """Of gigabytes; None for `auto`."""
    if amount == "auto":
        return None
    try:
        return int(float(amount) * 1e9)
    except ValueError as error:
        raise UsageError(f"{amount!r} gigabytes to keep samples in; expected a number, or nothing") from error


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
    from evl_cache.report import worst_classes

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
    from evl_cache.catalog import find_training_caches, split_clips
    from evl_cache.train import train

    stray = [name for name in ("root", "model", "frames") if _is_given(name)]
    if stray:
        raise UsageError(f"--{stray[0]} is for --online, or for extract: a cache has its own")
    caches = find_training_caches(
        given["dataset"],
        given["cache"],
        given["val_cache"],
        head=options.head,
        head_layers=options.head_layers,
        needs_maps=options.temporal_cross_attention,
        same_cache_for_val=given["val_clips"] is not None,
    )
    train_rows, val_rows = split_clips(*caches, **names)
    out = _out(given, caches[0].path.name, processes)
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
    from evl_cache.online import train_online

    if given["dataset"] is None or given["cache"] is not None or given["val_cache"] is not None:
        raise UsageError("--online reads videos: give --dataset and --root, as for extract, and no cache")
    storage = {"tokens": "fp16", "maps": "fp16", "codec": "default", "cache": None}
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


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _out(given: dict[str, Any], name: str, processes: Any) -> Path:
    """The run directory; the first process chooses a new one for all."""
    from evl_cache.catalog import next_run_directory

    out: Path = given["out"] or processes.on_first(
        lambda: next_run_directory(name, given["head"]), "while choosing the run directory"
    )
    if processes.is_first:
        click.echo(f"{name} -> {out}", err=True)
    return out


def _callbacks(on_step: Any) -> dict[str, Any]:
    return {} if on_step is None else {"on_step": on_step, "on_bottleneck": on_step.note_bottleneck}
