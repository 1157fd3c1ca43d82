"""What commands share: the `--debug` switch, lists in files, output."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click
from click.core import ParameterSource

from evl_cache.errors import NotEnoughMemory, is_want_of_memory, reason_alone, told_of_memory
from evl_cache.notation import encodable, escaped, without_logins

from .environment import check_environment, name_variables
from .words import at_home, told_of_dash, with_home

if TYPE_CHECKING:
    from evl_cache.caches.places import NotSeen
    from evl_cache.store import FeatureCache, TransferResult


_WORDS = "evl_cache.words"  # where a context keeps them
Function = TypeVar("Function", bound=Callable[..., object])


def printable(text: str) -> str:
    """One line that a terminal only shows: names in caches and errors may hold anything.

    Spaces stay as they are: a quoted word of a command to copy may hold several.
    """
    return shown(re.sub(r" *[^\S ]\s*", " ", text).strip())


def shown(line: str) -> str:
    """A line in which what a terminal would act on stands as an escape, and no URL has user and password."""
    return escaped(without_logins(line))


def say(line: object, *, err: bool = False) -> None:
    """Print one line; what a terminal would act on, as in names, stands as an escape."""
    click.echo(shown(str(line)), err=err)


def say_failure(name: object, reason: str) -> None:
    """Say on stderr that a file or clip failed; the line names it once."""
    say(f"failed: {name}: {reason_alone(reason, str(name))}", err=True)


def write_csv(file: TextIO, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as CSV, which holds names of any bytes; those that a terminal would act on as escapes, if it is one."""
    told = escaped if file.isatty() else encodable
    csv.writer(file).writerows([told(str(cell)) for cell in row] for row in rows)


class Command(click.Command):
    """A command with `--debug`, and with its examples below the options."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = [line.strip() for line in examples.strip().splitlines()]
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_set_debug,
                help="Show the traceback of an error.",
            )
        )

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context, which knows the command line as it was given."""
        words = (info_name or "", *args)
        try:
            context = super().make_context(info_name, [*map(with_home, args)], parent, **extra)
        except click.NoSuchOption as error:
            raise told_of_dash(error, words[1:]) from error
        context.meta[_WORDS] = words
        return context

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, each on its own line."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read arguments and environment. Raises: click.UsageError for a variable that is none of the command's."""
        name_variables(ctx)
        rest = super().parse_args(ctx, args)  # --help ends here
        for name, value in ctx.params.items():  # those of `args` have it, and there ./~ is a folder's name
            if ctx.get_parameter_source(name) is ParameterSource.ENVIRONMENT:
                ctx.params[name] = at_home(value)
        check_environment(ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises: NotEnoughMemory, with what to do, where torch gets none."""
        try:
            return super().invoke(ctx)
        except RuntimeError as error:
            if not is_want_of_memory(error):
                raise
            raise NotEnoughMemory(f"{told_of_memory(error)}; {self._memory_remedy()}") from error

    def _memory_remedy(self) -> str:
        """What takes less memory, of the options that this command has."""
        flags = {flag for parameter in self.params for flag in parameter.opts}
        known = {
            "--batch": "a smaller --batch",
            "--accumulate": "--batch auto, more --accumulate",
            "--cache-on-device": "less --cache-on-device",
            "--head": "fewer --head-layers",
        }
        ways = [way for flag, way in known.items() if flag in flags]
        ways += ["--device cpu, or a device that others leave free"] if "--device" in flags else []
        return f"use {', '.join(ways)}" if ways else "free some of it"


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ["EVL_CACHE_DEBUG"] = "1"


def check_file_to_write(flag: str, path: Path) -> None:
    """Check before the work that a file can be written after it. Raises: UsageError."""
    from evl_cache.errors import UsageError

    if path.is_dir() or not path.resolve().parent.is_dir():
        why = "is a folder" if path.is_dir() else f"there is no folder {path.resolve().parent}"
        raise UsageError(f"{flag} {path}: {why}; expected a file in a folder that is there")


def given_command() -> str:
    """The command line, as it may be stored: URLs without their credentials, and in one line."""
    from evl_cache.store import public_text

    words = click.get_current_context().meta[_WORDS]
    return escaped(shlex.join(["evl-cache", *map(public_text, words)]))


def existing_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file; click has checked that it exists. Raises: UsageError where it cannot be read so."""
    from evl_cache.errors import UsageError

    # Names of files need not be UTF-8; in another encoding, such as UTF-16, zeros stand between the letters.
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); expected a file with one name a line"
        ) from error
    if "\0" in text:
        raise UsageError(f"{path}: not UTF-8 text (it holds zeros); expected one name a line")
    return [line.strip() for line in text.split("\n") if line.strip()]


def default_device(name: str | None) -> str:
    """The device asked for, or a GPU where there is one: under torchrun and `srun`, the one of this process.

    Every command that computes begins here, so torch's threads are limited here too.

    Raises: UsageError for one that is not there.
    """
    import torch

    from evl_cache.errors import UsageError
    from evl_cache.precision import device_named
    from evl_cache.processes import ProcessPlace, limit_torch_threads

    limit_torch_threads()

    if name is None and not torch.cuda.is_available():
        return "cpu"
    name = ProcessPlace.on_computer().device(name or "cuda")
    try:
        device = torch.device(device_named(name))
    except UsageError as error:
        raise UsageError(f"--{error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu, or another"
        )
    return str(device)


def show_transfer(result: TransferResult, as_json: bool) -> None:
    """What push and pull did, in one line or as JSON."""
    if as_json:
        from dataclasses import asdict

        print_json(asdict(result))
        return
    digest = f"digest {result.cache_digest}" if result.cache_digest else "not complete"
    click.echo(
        f"{result.place}: {result.blocks_moved} of {result.blocks} blocks copied "
        f"({human_bytes(result.nbytes_moved)}), {digest}"
    )


def print_json(content: Mapping[str, object]) -> None:
    """One JSON object on stdout."""
    from evl_cache.canonical_json import json_text

    click.echo(json_text(content, indent=2))


def human_bytes(count: float) -> str:
    """`12.3 GB`, decimal units as disks are sold in."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """`3 d 4 h`, `2 h 05 min`, `12 min` or `40 s`."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if hours >= 48:
        return f"{int(hours) // 24} d {int(hours) % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"


def say_outage(message: str) -> None:
    """Say a line on stderr beside what the command prints: that an outage began, or what is waited for."""
    click.echo(printable(message), err=True)


def tell_rules(ours: str | Path, rule: int, theirs: str | Path, other_rule: int) -> None:
    """Say on stderr where frames of a run or a training cache, and of the cache it is scored on, are of different rules."""
    from evl_cache.runs import frame_rules_differ

    if told := frame_rules_differ(ours, rule, theirs, other_rule):
        click.echo(f"note: {printable(told)}", err=True)


def tell_not_seen(not_seen: Iterable[NotSeen]) -> None:
    """Say on stderr which places, and which caches at one, could not be looked at."""
    for found in not_seen:
        click.echo(f"not seen: {printable(str(found))}", err=True)


def tell_found(*caches: FeatureCache) -> None:
    """Say on stderr which training and validation cache were found."""
    for side, cache in zip(("train", "val"), caches, strict=True):
        done = "" if cache.is_complete else f", {cache.num_blocks_done} of {cache.num_blocks} blocks done"
        click.echo(f"{side} cache: {cache.place}{done}", err=True)
