"""Read and write what users do: layers (`8-12`, `9,11,12`), views (`3x1`), command lines, names of any bytes."""

import operator
import re
import reprlib
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from evl_cache.errors import UsageError

_SURROGATE = re.compile("[\ud800-\udfff]")
# What follows a URL's slashes, of which `Path` leaves one.
_LOGIN = re.compile(
    r"(://|(?<![\w/.-])[a-z][a-z0-9+.-]+:/+)(?:[^\s/@:]*:(?!/|[0-9]{1,5}/)[^\s@]*@|[^\s/]*@)", re.IGNORECASE
)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layers of `8-12` (inclusive), `9,11,12` or a mixture.

    Raises: UsageError for anything else.
    """
    out: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--layers {text!r}; expected layers numbered from 1, such as 8-12 or 9,11,12")
        if dash and int(last) < int(first):
            raise UsageError(f"--layers {text!r}: {part} runs backwards; expected {last}-{first}")
        out.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(out))


def format_layers(layers: Sequence[int]) -> str:
    """Return layers as `parse_layers` reads them: `8-12`, or `9,11,12` where some are left out."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def layers_of(wanted: object) -> tuple[int, ...]:
    """Return numbers of layers as Python code gives them: shallow to deep, each once. One number is a list of one.

    Another order is refused, not sorted: features come back as a list, whose places would be taken for other layers.

    Raises: UsageError for anything else.
    """
    layers, ascending = _whole_numbers(wanted), layer_set(wanted)
    if layers != ascending:
        expected = ", ".join(map(str, ascending))
        raise UsageError(f"layers {list(layers)}; expected shallow to deep, each once: ({expected})")
    if not layers:
        raise UsageError("layers (); expected at least one")
    return layers


def layer_set(wanted: object) -> tuple[int, ...]:
    """Return numbers of layers that are given in any order: ascending, each once. Errors as `layers_of`."""
    return tuple(sorted(set(_whole_numbers(wanted))))


def _whole_numbers(wanted: Any) -> tuple[int, ...]:
    given = wanted.tolist() if hasattr(wanted, "tolist") else wanted
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)
    numbers = [whole_number(value) for value in (given if is_list else [given])]
    found = tuple(number for number in numbers if number is not None)
    if len(found) < len(numbers):
        raise UsageError(f"layers {reprlib.repr(wanted)}; expected whole numbers, such as (9, 10)")
    return found


def whole_number(value: Any) -> int | None:
    """Return a whole number of Python, numpy or torch; None for anything else.

    Truth values, which Python counts among the numbers, are none.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def format_rows(rows: Iterable[int]) -> str:
    """Return rows, each once and in order, as `parse_rows` reads them: `0-79,100`."""
    parts: list[str] = []
    first = last = -2
    for row in [*sorted(set(rows)), -2]:
        if row == last + 1:
            last = row
            continue
        if last >= 0:
            parts.append(f"{first}" if first == last else f"{first}-{last}")
        first = last = row
    return ",".join(parts)


def parse_rows(text: str, *, below: int) -> list[int]:
    """Return the rows of `0-79,100`, which are all below a number. Raises: ValueError for anything else."""
    rows: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first)
        previous = rows[-1] if rows else -1
        if not previous < begin <= end < below:
            raise ValueError(f"rows {part[:40]!r}; expected ascending numbers below {below}")
        rows.extend(range(begin, end + 1))
    return rows


def parse_views(text: str) -> tuple[int, int]:
    """Return the numbers of temporal and spatial views of `3x1`. Raises: UsageError for anything else."""
    temporal, cross, spatial = text.lower().partition("x")
    if not cross or not temporal.isdecimal() or not spatial.isdecimal():
        raise UsageError(f"--views {text!r}; expected temporal x spatial, such as 3x1")
    return int(temporal), int(spatial)


def command_line(words: Iterable[str], *places: str) -> str | None:
    """Return one line that a shell reads as these words and nothing else.

    None where a word holds what no line can show: line ends, control characters, marks that change the direction of text.

    Args:
        places: words at the end that are no options, even where they begin with a dash.
    """
    dashes = ("--",) if any(place.startswith("-") for place in places) else ()
    line = shlex.join([*words, *dashes, *places])
    return line if line.isprintable() else None


def without_logins(text: str) -> str:
    """Return a text in which no URL has user and password; a secret key may have slashes, as Amazon's have."""
    return _LOGIN.sub(r"\1", text)


def escaped(text: str) -> str:
    """Return one line that a terminal only shows and every encoding of Unicode holds.

    What it would act on, and bytes of a name that are not UTF-8, stand as escapes: `\\x1b`, `\\n`, `\\xff`.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: bytes of a name that are none stand as escapes, all else as it is."""
    return _SURROGATE.sub(lambda found: _escape(found.group()), text)


def _escape(character: str) -> str:
    byte = ord(character) - 0xDC00  # as Python holds the bytes of a name that are not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else repr(character)[1:-1]


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 clip`, `2 clips`, `3 classes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"
