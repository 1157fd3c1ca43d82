"""`--mode`: permissions of the files that a command makes."""

import click

from evl_cache.errors import UsageError

from .common import Function


def _set_mode(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0o400 <= mode <= 0o777 or mode & 0o600 != 0o600:
        raise UsageError(
            f"--mode {value}: expected octal permissions that let the owner read and write, such as 640"
        )
    from evl_cache.store import set_file_mode

    set_file_mode(mode)


def mode_option(function: Function) -> Function:
    """The option, which acts by itself."""
    return click.option(
        "--mode",
        metavar="640",
        expose_value=False,
        callback=_set_mode,
        help="Of new files [umask, group-readable].",
    )(function)
