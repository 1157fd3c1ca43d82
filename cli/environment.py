"""Variables of the environment: one for every option of every command, and those that are no option."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import click

from evl_cache.notation import escaped

PREFIX = "EVL_CACHE"
# What else begins so, and what heeds it.
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "EVL_CACHE_ROOT": "where caches lie",
        "EVL_CACHE_COPY_ROOT": "where copies of remote caches lie",
        "EVL_CACHE_COPY_GB": "how large they may become",
        "EVL_CACHE_SERVER_PATIENCE": "how long servers are waited for",
        "EVL_CACHE_PROVE_FRAMES": "frames are compared with a plain decode",
        "EVL_CACHE_HEAD_PATH": "how the decoder is computed",
        "EVL_CACHE_DEBUG": "the traceback of an error is shown, as --debug does",
        "EVL_CACHE_COMMIT": "benchmarks.device",
        "EVL_CACHE_REQUIRE_GPU": "tests",
        "EVL_CACHE_TESTS_DECODERS": "tests",
        "EVL_CACHE_SIMULATION": "tests",
        "EVL_CACHE_SIMULATIONS": "tests",
        "EVL_CACHE_SIMULATION_FIRST": "tests",
        "EVL_CACHE_DISK_SCHEDULE": "tests",
        "EVL_CACHE_SERVER_SCHEDULE": "tests",
        "EVL_CACHE_CONCURRENT_S": "tests",
        "EVL_CACHE_FULL_SIZE": "tests",
    }
)


def name_variables(ctx: click.Context) -> None:
    """Give a command's options the variables of their flags' names: click knows those of their parameters' names alone."""
    if (prefix := _prefix(ctx)) is not None:
        _name(_options(ctx), prefix)


def _prefix(ctx: click.Context) -> str | None:
    """The prefix of a command's variables; None where it is called alone, as in tests."""
    prefix = ctx.auto_envvar_prefix
    return prefix if prefix is not None and prefix.startswith(f"{PREFIX}_") else None


def _options(ctx: click.Context) -> list[click.Option]:
    return [parameter for parameter in ctx.command.get_params(ctx) if isinstance(parameter, click.Option)]


def _name(options: Iterable[click.Option], prefix: str) -> None:
    for option in options:
        flags = [flag[2:].replace("-", "_") for flag in option.opts if flag.startswith("--")]
        others = [f"{prefix}_{flag.upper()}" for flag in flags if flag != option.name]
        if others and option.envvar is None:
            option.envvar = others


def _variables_of(options: Iterable[click.Option], prefix: str) -> set[str]:
    own = {f"{prefix}_{option.name.upper()}" for option in options if option.name}
    return own.union(*(option.envvar for option in options if isinstance(option.envvar, list)))


def check_environment(ctx: click.Context) -> None:
    """Refuse a variable of a command that is none of its options', and note those that nothing heeds.

    Raises: click.UsageError, as for a misspelt option.
    """
    prefix = _prefix(ctx)
    if prefix is None or ctx.resilient_parsing:
        return
    given = {name for name, value in os.environ.items() if name.startswith(f"{PREFIX}_") and value}
    known = _variables_of(_options(ctx), prefix)
    own = {name for name in given if name.startswith(f"{prefix}_")}
    for name in sorted(own - known):
        near = _nearest(name, known)
        raise click.UsageError(
            f"{escaped(name)}: {ctx.info_name} has no such option{near}; correct it, or unset it", ctx
        )
    for name in sorted(given - own - OTHERS.keys()):
        if not _is_of_a_command(name, ctx):
            near = _nearest(name, _all_names(ctx))
            click.echo(f"note: {escaped(name)} is in the environment, and nothing heeds it{near}", err=True)


def _is_of_a_command(name: str, ctx: click.Context) -> bool:
    return any(name.startswith(f"{prefix}_") for prefix in _commands(ctx))


def _commands(ctx: click.Context) -> dict[str, str]:
    """Prefix of a command's variables -> its name."""
    group = ctx.parent.command if ctx.parent is not None else None
    if ctx.parent is None or not isinstance(group, click.Group):
        return {}
    names = group.list_commands(ctx.parent)
    return {f"{PREFIX}_{name.upper().replace('-', '_')}": name for name in names}


def _all_names(ctx: click.Context) -> set[str]:
    """Every variable that there is; commands' modules are loaded, so that this is for errors alone."""
    found = set(OTHERS)
    for prefix, name in _commands(ctx).items():
        assert ctx.parent is not None and isinstance(ctx.parent.command, click.Group)
        command = ctx.parent.command.get_command(ctx.parent, name)
        options = [] if command is None else [p for p in command.params if isinstance(p, click.Option)]
        _name(options, prefix)
        found |= _variables_of(options, prefix)
    return found


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return f"; the nearest is {near[0]}" if near else ""
