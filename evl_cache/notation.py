"""Read and write what users do: layers (`8-12`, `9,11,12`), views (`3x1`), command lines, names of any bytes."""

import re
import shlex
from collections.abc import Iterable, Sequence

from evl_cache.errors import UsageError

_SURROGATE = re.compile("[\ud800-\udfff]")


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
