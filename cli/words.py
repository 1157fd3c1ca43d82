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
    named = next(_files_with_dash(words, error.option_name), None)
    if named is None:
        return error
    told = f"{error.format_message().rstrip('.')}; a file whose name begins with - is given as ./{named}"
    return click.UsageError(told, error.ctx)


def _files_with_dash(words: Iterable[str], unknown: str) -> Iterator[str]:
    """Yield words that may be files, of those that an unknown option can have been read from: `-3` is from `-3B32.mp4`."""
    for word in words:
        is_unknown = word.startswith(unknown if unknown.startswith("--") else "-")
        if is_unknown and not _is_number(word) and (os.path.lexists(word) or _looks_like_file(word)):
            yield word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _looks_like_file(word: str) -> bool:
    return not word.startswith("--") and "." in word.lstrip("-.") and "=" not in word
