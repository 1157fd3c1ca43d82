"""The options of `train`, and what they are to the package."""

from pathlib import Path
from typing import Any

import click

from evl_cache.errors import UsageError

from .common import Command
from .extract import dataset_options

ONLINE = "root split annotations list model pretrained layers frames sampling stride views train-views augment-seed flip limit"
_ONLINE_ONLY = {*ONLINE.split(), "compute-dtype", "allow-missing", "decode-workers"}
_MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
_SAME = (
    "head epochs steps accumulate lr warmup_steps weight_decay grad_clip dropout label_smoothing ema seed order_seed "
    "save_every_steps shuffle_blocks"
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


def _gigabytes(name: str, help_text: str) -> Any:
    return click.option(name, metavar="[GB]", is_flag=False, flag_value="auto", help=help_text)


def _path(name: str, help_text: str, *, exists: bool = False) -> Any:
    kind = click.Path(path_type=Path, exists=exists)
    return click.option(name, type=kind, metavar="FILE" if exists else "PATH", help=help_text)


def train_options(function: Any) -> Any:
    """What is trained, how, and where."""
    options = [
        click.option("--dataset", metavar="NAME", help="Find its caches under $EVL_CACHE_ROOT."),
        _path("--cache", "Or: the training cache,"),
        _path("--val-cache", "and validation [same, with --val-clips]."),
        _path("--train-clips", "Ids or paths, a line each [all but val].", exists=True),
        _path("--val-clips", "Ids or paths, a line each [all].", exists=True),
        click.option("--recipe", metavar="k400|ssv2", help="Published settings; options given win."),
        click.option(
            "--head",
            default="decoder4",
            metavar="NAME",
            help="decoderN, linear, mlap, … (docs/heads.md) [decoder4].",
        ),
        click.option("--head-layers", metavar="9-12", help="Other layers than the last."),
        click.option("--no-temporal-conv", is_flag=True, help="Without the temporal convolution."),
        click.option("--no-temporal-pos-embed", is_flag=True, help="Without the position embedding."),
        click.option("--no-temporal-cross-attention", is_flag=True, help="Without motion from maps."),
        click.option("--epochs", type=int, metavar="N", help="[30, unless --steps]"),
        click.option("--steps", type=int, metavar="N", help="Length in optimiser steps instead."),
        click.option("--batch", metavar="N|auto", help="Samples of a step; auto: most that fit [64]"),
        click.option("--accumulate", type=int, metavar="N", help="Passes a step is split into [1]."),
        click.option("--lr", type=float, metavar="LR", help="Peak; cosine to zero [4e-4]."),
        click.option("--warmup-steps", type=int, metavar="N", help="Linear, from zero [0]."),
        click.option("--weight-decay", type=float, metavar="W", help="[0.05]"),
        click.option(
            "--decay-norms-and-biases/--no-decay-norms-and-biases", default=None, help="[with, as published]"
        ),
        click.option("--grad-clip", type=float, metavar="NORM", help="Of all gradients together [off]."),
        click.option("--dropout", type=float, metavar="P", help="[0.5]"),
        click.option("--label-smoothing", type=float, metavar="P", help="[0]"),
        click.option("--ema", type=float, metavar="DECAY", help="Validate and save averaged weights."),
        click.option("--precision", metavar="DTYPE", help="float32, float16, bfloat16 [GPU's default]."),
        click.option("--seed", type=int, metavar="N", help="[0]"),
        click.option("--order-seed", type=int, metavar="N", help="Of the clips' order alone [--seed]."),
        _path("--out", "Run directory [a new one under runs/]."),
        click.option("--resume", is_flag=True, help="Go on from the last state in --out."),
        click.option("--save-every-steps", type=int, metavar="N", help="The last state [every epoch]."),
        _gigabytes("--cache-in-ram", "Keep samples once read [half of what is free]."),
        _gigabytes("--cache-on-device", "The same on the GPU."),
        click.option(
            "--shuffle-blocks",
            type=int,
            metavar="N",
            help="Shuffle within N blocks at a time; 0: all [0 on a local disk, else 16].",
        ),
        click.option("--trust", is_flag=True, help="Do not check chunks against their marks."),
        click.option("--tensorboard", is_flag=True, help="Write its event files too."),
        click.option("--online", is_flag=True, help="No cache: the backbone live on videos."),
        click.option(
            "--rank-timeout", type=float, default=600.0, metavar="S", help="Of a process torchrun lost [600]."
        ),
        click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N [the GPU, if any]."),
        click.option("--json", "as_json", is_flag=True, help="Report as JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def make_train_options(given: dict[str, Any], device: str) -> Any:
    """The TrainOptions of the command line."""
    from evl_cache.notation import parse_layers
    from evl_cache.train.options import options_of

    places = {place: given[name] for place, name in (("ram", "cache_in_ram"), ("device", "cache_on_device"))}
    chosen = [place for place, amount in places.items() if amount is not None]
    if len(chosen) == 2:
        raise UsageError("--cache-in-ram and --cache-on-device; expected one of them at most")
    values = {name: given[name] for name in (*_SAME.split(), "decay_norms_and_biases")}
    return options_of(
        given["recipe"],
        {
            **values,
            "batch": _batch(given["batch"]),
            **{name: not given[f"no_{name}"] for name in _MODULES},
            "head_layers": None if given["head_layers"] is None else parse_layers(given["head_layers"]),
            "precision": given["precision"] or ("float32" if device == "cpu" else "bfloat16"),
            "device": device,
            "keep_in": chosen[0] if chosen else None,
            "keep_bytes": _bytes(places[chosen[0]]) if chosen else None,
            "tensorboard": given["tensorboard"],
        },
    )


def _batch(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--batch {text!r}; expected a number, or auto") from error


def _bytes(amount: str) -> int | None:
    """Of gigabytes; None for `auto`."""
    if amount == "auto":
        return None
    try:
        return int(float(amount) * 1e9)
    except ValueError as error:
        raise UsageError(f"{amount!r} gigabytes to keep samples in; expected a number, or nothing") from error


def refuse_online_options() -> None:
    """Raises: UsageError for an option that only --online takes."""
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        is_online = parameter.opts[0].removeprefix("--") in _ONLINE_ONLY
        if is_online and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]} is for --online, and for extract: a cache has its own")
