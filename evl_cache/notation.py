"""Read and write layers, views and command lines as users do: `8-12`, `9,11,12`, `3x1`, `info 'a b'`."""

import shlex
from collections.abc import Iterable, Sequence

from evl_cache.errors import UsageError


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
