"""The options of `train`, and what they are to the package."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from evl_cache.errors import UsageError
from evl_cache.extract_options import Role, options_with
from evl_cache.notation import parse_layers

from .cache_flags import (
    CacheFlags,
    Flag,
    TrainingData,
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
from .common import Command, Function, tell_rules
from .extract_flags import hidden_flag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from evl_cache.runs import RunConfig
    from evl_cache.train import TrainOptions

_MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
# The flags that say what an option is, where they have not its name.
_FLAGS_OF = {
    **{name: (f"no_{name}",) for name in _MODULES},
    "keep_in": ("cache_in_ram", "cache_on_device"),
    "keep_bytes": ("cache_in_ram", "cache_on_device"),
}


class TrainCommand(Command):
    """A command that also takes the options of extract for --online; its help lists them in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += map(hidden_flag, options_with(Role.ONLINE))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, and what --online takes beside them."""
        super().format_options(ctx, formatter)
        with formatter.section("With --online, as extract --help says"):
            room = formatter.width - formatter.current_indent
            listed = " ".join(option.flag for option in options_with(Role.ONLINE))
            for line in wrap(listed, room, break_on_hyphens=False):
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


@dataclass(frozen=True, kw_only=True)
class TrainFlags(CacheFlags):
    """The values of train's options, as the command line has them. `of_videos`: those of extract, by parameter."""

    again: Path | None
    recipe: str | None
    head: str
    head_layers: str | None
    no_temporal_conv: bool
    no_temporal_pos_embed: bool
    no_temporal_cross_attention: bool
    epochs: int | None
    steps: int | None
    batch: str | None
    accumulate: int | None
    lr: float | None
    warmup_steps: int | None
    weight_decay: float | None
    decay_norms_and_biases: bool | None
    grad_clip: float | None
    dropout: float | None
    label_smoothing: float | None
    ema: float | None
    seed: int | None
    order_seed: int | None
    cache_on_device: str | None
    shuffle_blocks: int | None
    tensorboard: bool
    cuda_graph: bool | None
    online: bool
    rank_timeout: float
    of_videos: Mapping[str, Any]

    def train_options(self, device: str) -> TrainOptions:
        """The package's options. Raises: UsageError for those that cannot be."""
        from evl_cache.train import TrainOptions, options_of
        from evl_cache.train.again import options_again

        same = {f.name: getattr(self, f.name) for f in fields(TrainOptions) if hasattr(self, f.name)}
        values = {
            **same,
            "batch": _batch(self.batch),
            **{name: not getattr(self, f"no_{name}") for name in _MODULES},
            "head_layers": None if self.head_layers is None else parse_layers(self.head_layers),
            "precision": self.precision_on(device),
            "device": device,
            **self._kept_samples(),
        }
        if self.again is None:
            return options_of(self.recipe, values)
        chosen = {"device", *(name for name in values if any(map(is_given, _FLAGS_OF.get(name, (name,)))))}
        return options_again(self.again, self.run_again, {name: values[name] for name in chosen})

    @cached_property
    def run_again(self) -> RunConfig:
        """The configuration of the run to do again. Raises: UsageError where that cannot be, or not with other options."""
        from evl_cache.runs import read_run_config
        from evl_cache.train.again import check_again

        assert self.again is not None
        others = {"--online": self.online, "--recipe": self.recipe, "--dataset": self.dataset}
        if named := [flag for flag, value in others.items() if value]:
            raise UsageError(
                f"--again and {named[0]}; expected one of them: --again takes options and caches from a run, and other "
                "options beside it"
            )
        config = read_run_config(self.again)
        check_again(self.again, config)
        return config

    def device_again(self) -> str | None:
        """The device asked for, or the kind of device that the run to do again had; None for the default."""
        if self.device is not None or self.again is None:
            return self.device
        return str(self.run_again.training.get("device", "cpu")).partition(":")[0]

    def find_again(self, *, is_told: bool) -> TrainingData:
        """The caches and clips of the run to do again, but for those named."""
        from evl_cache.train.again import data_again

        assert self.again is not None
        train, val, train_rows, val_rows = data_again(
            self.again,
            self.run_again,
            cache=self.cache,
            val_cache=self.val_cache,
            train_names=self.train_names,
            val_names=self.val_names,
            trust=self.trust,
        )
        if is_told:
            tell_rules(train.place, train.frame_rule, val.place, val.frame_rule)
        return TrainingData(train=train, val=val, train_rows=train_rows, val_rows=val_rows)

    def _kept_samples(self) -> dict[str, str | int | None]:
        """Where samples are kept once read, and how many bytes of them."""
        if self.cache_in_ram is not None and self.cache_on_device is not None:
            raise UsageError("--cache-in-ram and --cache-on-device; expected one of them at most")
        if self.cache_on_device is not None:
            keep = gigabytes("--cache-on-device", self.cache_on_device)
            return {"keep_in": "device", "keep_bytes": keep}
        keep = gigabytes("--cache-in-ram", self.cache_in_ram)
        return {"keep_in": None if self.cache_in_ram is None else "ram", "keep_bytes": keep}


def train_flags(function: Function) -> Function:
    """What is trained, how, and where."""
    flags: list[Flag[Function]] = [
        cache_flags,
        path_flag("--again", "A run, to do as it was; options given win."),
        click.option("--recipe", metavar="k400|ssv2", help="The EVL paper's settings; options given win."),
        click.option(
            "--head",
            default="decoder4",
            metavar="NAME",
            help="decoderN, … (docs/heads.md) [decoder4].",
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
        click.option(
            "--weight-decay", type=float, metavar="W", help="AdamW's pull of weights to zero [0.05]."
        ),
        click.option(
            "--decay-norms-and-biases/--no-decay-norms-and-biases", default=None, help="[with, as published]"
        ),
        click.option("--grad-clip", type=float, metavar="NORM", help="Of all gradients together [off]."),
        click.option(
            "--dropout", type=float, metavar="P", help="Share of features dropped in training [0.5]."
        ),
        click.option("--label-smoothing", type=float, metavar="P", help="[0]"),
        click.option("--ema", type=float, metavar="DECAY", help="Validate and save averaged weights."),
        precision_flag,
        click.option("--seed", type=int, metavar="N", help="Of start, order and dropout [0]."),
        click.option("--order-seed", type=int, metavar="N", help="Of the clips' order alone [--seed]."),
        path_flag("--out", "Run directory [a new one under runs/]."),
        click.option("--resume", is_flag=True, help="Go on from the last state in --out."),
        click.option("--save-every-steps", type=int, metavar="N", help="The last state [every epoch]."),
        gigabytes_flag("--cache-in-ram", "Keep what was read [half of what is free]."),
        gigabytes_flag("--cache-on-device", "The same on the GPU."),
        click.option(
            "--shuffle-blocks",
            type=int,
            metavar="N",
            help="Within N blocks; 0: all [local: 0, else 16].",
        ),
        read_threads_flag,
        trust_flag,
        click.option(
            "--cuda-graph/--no-cuda-graph", default=None, help="Record a step, replay it [on a GPU]."
        ),
        click.option("--tensorboard", is_flag=True, help="Write its event files too."),
        click.option("--online", is_flag=True, help="No cache: the backbone live on videos."),
        click.option(
            "--rank-timeout", type=float, default=600.0, metavar="S", help="Of a process torchrun lost [600]."
        ),
        device_flag,
        json_flag,
    ]
    return add_flags(function, flags)


def is_given(parameter: str) -> bool:
    """Whether the command line, or the environment, names an option of the command that runs."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _batch(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"--batch {text!r}; expected a number, or auto") from error


def refuse_online_options() -> None:
    """Raises: UsageError for an option that only --online takes."""
    context = click.get_current_context()
    for option in options_with(Role.ONLINE):
        source = context.get_parameter_source(option.parameter)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{option.flag} is for --online, and for extract: a cache has its own")
