"""docs/commands.md, made from what the commands say of themselves.

python -m tools.command_reference           print it
python -m tools.command_reference --write   write it
python -m tools.command_reference --check   exit with 1 where the file says something else
"""

import sys
from pathlib import Path

import click

from evl_cache_cli.main import COMMANDS, cli

PATH = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
WIDTH = 100  # columns of the help texts; not the terminal's, so that everyone makes the same file
_COMMAND = "python -m tools.command_reference"
_HEAD = f"""\
# Commands

<!-- Made by `{_COMMAND} --write` from the commands' own help; a test compares. -->

Every command exits with 0 when it is done, 1 when it failed or found damage, 2 when it was used wrongly, and 3
when it finished but some clips failed. Errors are one line on stderr; `--debug` adds the traceback. Results go to
stdout, as one JSON object with `--json`. Every option can be set in the environment:
`EVL_CACHE_<COMMAND>_<OPTION>`, such as `EVL_CACHE_EXTRACT_MODEL`. A command refuses a variable that begins with its
name and is none of its options, as it does a misspelt option, and tells of any other `EVL_CACHE_…` that is not heeded.
"""


def reference() -> str:
    """The whole document."""
    group = cli.make_context("evl-cache", [], resilient_parsing=True, terminal_width=WIDTH)
    parts = [_HEAD, _section("evl-cache", cli, group)]
    for name in COMMANDS:
        command = cli.get_command(group, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=group, terminal_width=WIDTH)
        parts.append(_section(f"evl-cache {name}", command, context))
    return "\n".join(parts)


def _section(title: str, command: click.Command, context: click.Context) -> str:
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join([f"## {title}", "", "```text", *lines, "```", ""])


@click.command()
@click.option("--write", is_flag=True, help="Write docs/commands.md.")
@click.option("--check", is_flag=True, help="Exit with 1 where docs/commands.md says something else.")
def main(write: bool, check: bool) -> None:
    """Print, write or check the command reference."""
    made = reference()
    if write:
        PATH.write_text(made, encoding="utf-8")
    if check and (not PATH.is_file() or PATH.read_text(encoding="utf-8") != made):
        click.echo(f"error: {PATH.name} is not what the commands say; run {_COMMAND} --write", err=True)
        sys.exit(1)
    if not write and not check:
        click.echo(made, nl=False)


if __name__ == "__main__":
    main()
