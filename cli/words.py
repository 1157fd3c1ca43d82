"""Words of a command line as shells leave them: a `~` that no shell expanded, a file whose name begins with a dash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click


def with_home(word: str) -> str:
    """Return a word with the home directory in the place of `~`, also in `--root=~/videos`, which shells leave as it is."""
    flag, equals, value = word.partition("=")
    if word.startswith("--") and equals:
        return f"{flag}={_expanded(value)}"
    return _expanded(word)


def at_home(value: Any) -> Any:
    """Return the value of an option, which may come from the environment, with the home directory in the place of `~`."""
    if isinstance(value, tuple):
        return tuple(map(at_home, value))
    return type(value)(_expanded(str(value))) if isinstance(value, str | Path) else value


def _expanded(word: str) -> str:
    # ./~ is what names a folder of that name.
    return os.path.expanduser(word) if word == "~" or word.startswith("~/") else word


def told_of_dash(error: click.NoSuchOption, words: Iterable[str]) -> click.UsageError:
    """Return the error, with what to do where a file was taken for an option as its name begins with a dash."""
    named = next(_files_with_dash(words), None)
    if named is None:
        return error
    told = f"{error.format_message().rstrip('.')}; a file whose name begins with - is given as ./{named}"
    return click.UsageError(told, error.ctx)


def _files_with_dash(words: Iterable[str]) -> Iterator[str]:
    return (
        word for word in words if word.startswith("-") and (os.path.lexists(word) or _looks_like_file(word))
    )


def _looks_like_file(word: str) -> bool:
    return not word.startswith("--") and "." in word.lstrip("-.") and "=" not in word
