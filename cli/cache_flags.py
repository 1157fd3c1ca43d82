"""What train and sweep share: the caches, the clips of each side, where samples are kept, and how it is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evl_cache.errors import UsageError

from .common import Function, existing_lines, tell_found, tell_not_seen, tell_rules

if TYPE_CHECKING:
    from evl_cache.store import FeatureCache
    from evl_cache.train import HeadNeeds

Flag = Callable[[Function], Function]


def path_flag(name: str, help_text: str, *, exists: bool = False) -> Flag[Function]:
    """An option that takes a path."""
    kind = click.Path(path_type=Path, exists=exists)
    return click.option(name, type=kind, metavar="FILE" if exists else "PATH", help=help_text)


def gigabytes_flag(name: str, help_text: str) -> Flag[Function]:
    """An option that takes gigabytes, or nothing for what is free."""
    return click.option(name, metavar="[GB]", is_flag=False, flag_value="auto", help=help_text)


def add_flags(function: Function, flags: Iterable[Flag[Function]]) -> Function:
    """Give a command options, in their order."""
    for flag in reversed(tuple(flags)):
        function = flag(function)
    return function


def cache_flags(function: Function) -> Function:
    """The options that say which caches, and which clips of them."""
    return add_flags(
        function,
        (
            click.option("--dataset", metavar="NAME", help="Find its caches under $EVL_CACHE_ROOT."),
            path_flag("--cache", "Or: the training cache,"),
            path_flag("--val-cache", "and validation [same, with --val-clips]."),
            path_flag("--train-clips", "Ids or paths, a line each [all but val].", exists=True),
            path_flag("--val-clips", "Ids or paths, a line each [all].", exists=True),
        ),
    )


_PRECISIONS = "float32, tf32, bfloat16, float16"
precision_flag = click.option("--precision", metavar="NAME", help=f"{_PRECISIONS} [device's].")
run_precision_flag = click.option("--precision", metavar="NAME", help=f"{_PRECISIONS} [the run's].")
read_threads_flag = click.option(
    "--read-threads", type=int, metavar="N", help="That read and decode [as many as suit]."
)
trust_flag = click.option("--trust", is_flag=True, help="Faster: do not look for damage on reading.")
device_flag = click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N [the GPU, if any].")
json_flag = click.option("--json", "as_json", is_flag=True, help="Report as JSON.")


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """The options' values, as the command line has them."""

    dataset: str | None
    cache: Path | None
    val_cache: Path | None
    train_clips: Path | None
    val_clips: Path | None
    precision: str | None
    out: Path | None
    resume: bool
    save_every_steps: int | None
    cache_in_ram: str | None
    read_threads: int | None
    trust: bool
    device: str | None
    as_json: bool

    @property
    def train_names(self) -> list[str] | None:
        """Clips to train on, of the file named."""
        return None if self.train_clips is None else existing_lines(self.train_clips)

    @property
    def val_names(self) -> list[str] | None:
        """Clips to validate on, of the file named."""
        return None if self.val_clips is None else existing_lines(self.val_clips)

    def precision_on(self, device: str) -> str:
        """The precision named, or the device's."""
        from evl_cache.precision import default_precision

        return self.precision or default_precision(device)

    def find(self, needs: HeadNeeds, *, is_told: bool = True) -> TrainingData:
        """The caches named, or the pair there is that fits, and the rows of each side."""
        from evl_cache.batches import split_clips
        from evl_cache.caches.pairing import find_training_caches

        train, val = find_training_caches(
            self.dataset,
            self.cache,
            self.val_cache,
            needs=needs,
            same_cache_for_val=self.val_clips is not None,
            trust=self.trust,
            on_found=tell_found if is_told else lambda train, val: None,
            on_not_seen=tell_not_seen if is_told else lambda not_seen: None,
        )
        if is_told:
            tell_rules(train.place, train.frame_rule, val.place, val.frame_rule)
        rows = split_clips(train, val, train_names=self.train_names, val_names=self.val_names)
        return TrainingData(train=train, val=val, train_rows=rows[0], val_rows=rows[1])


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The caches of a training, and the rows of clips of each; None is all of them."""

    train: FeatureCache
    val: FeatureCache
    train_rows: list[int] | None
    val_rows: list[int] | None


def gigabytes(flag: str, amount: str | None) -> int | None:
    """Bytes of the gigabytes given; None where none are, or `auto`."""
    if amount in (None, "auto"):
        return None
    try:
        return int(float(str(amount)) * 1e9)
    except (ValueError, OverflowError) as error:  # an infinite amount is none either
        raise UsageError(f"{flag} {amount!r}; expected gigabytes, or nothing") from error
