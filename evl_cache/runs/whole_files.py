"""Files of a run, and what is made of runs, written whole or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from evl_cache.canonical_json import json_text
from evl_cache.errors import EvlCacheError, first_line
from evl_cache.notation import encodable
from evl_cache.store import replacing
from evl_cache.untrusted.json_text import parse_json


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name that the file is to be written to; at the end it takes the place of what is at `path`.

    Raises: EvlCacheError where the disk refuses; what was there stays.
    """
    with refusals_named(path), replacing(path) as staging:
        yield staging


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """Name the file, and what to do, where it cannot be written. Raises: EvlCacheError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have kinds of their own
        raise EvlCacheError(
            f"cannot write {path}: {_reason(error)}; free space or check the disk, then run it again "
            "(a training with --resume)"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON for people, whole or not at all. Raises: as `json_text`."""
    write_text(path, json_text(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises: OSError; ValueError for what is no JSON, such as NaN of older versions."""
    return parse_json(path.read_bytes())


def read_json_lines(path: Path) -> list[Any]:
    """Read a log. Raises: as `read_json`."""
    return [parse_json(line) for line in path.read_bytes().splitlines()]


def write_text(path: Path, content: str) -> None:
    """Write text in UTF-8 with the line ends that it has, whole or not at all; see `encodable` for names that are none."""
    with whole_file(path) as staging:
        staging.write_text(encodable(content), encoding="utf-8", newline="")


def _reason(error: BaseException) -> str:
    """Return what the disk said, which torch hides behind a message of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__context__
    return first_line(error)
