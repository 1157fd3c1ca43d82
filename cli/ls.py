"""`evl-cache ls`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .common import Command, human_bytes, print_json, printable, tell_not_seen

if TYPE_CHECKING:
    from evl_cache.caches.listing import ListedCache

EXAMPLES = """
evl-cache ls
evl-cache ls /shared/caches s3://lab/caches --json
"""
_HEADINGS = (
    "data set",
    "split",
    "model",
    "layers",
    "frames",
    "views",
    "size",
    "complete",
    "who",
    "when",
    "place",
)


@click.command(cls=Command, name="ls", examples=EXAMPLES)
@click.argument("places", nargs=-1, metavar="[PLACE]...")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(places: tuple[str, ...], as_json: bool) -> int:
    """Caches there are, at the places given or those of $EVL_CACHE_ROOT.

    A place is a directory or a URL that holds caches, or is one. EVL_CACHE_ROOT names several as PATH does:
    /data/caches:/shared/caches:s3://lab/caches. What cannot be looked at is told on stderr, and the exit status is 1.
    """
    from evl_cache.caches.listing import ListedCache, list_caches

    seen = list(list_caches(places or None))
    listed = [found for found in seen if isinstance(found, ListedCache)]
    not_seen = [found for found in seen if not isinstance(found, ListedCache)]
    tell_not_seen(not_seen)
    if as_json:
        print_json(
            {
                "caches": [cache.to_json() for cache in listed],
                "not_seen": [{"place": found.place, "reason": found.reason} for found in not_seen],
            }
        )
    elif listed:
        for line in _table([tuple(map(printable, _row(cache))) for cache in listed]):
            click.echo(line)
    elif not not_seen:
        click.echo("no caches; run evl-cache extract, or set EVL_CACHE_ROOT", err=True)
    return 1 if not_seen else 0


def _row(cache: ListedCache) -> tuple[str, ...]:
    complete = "yes" if cache.is_complete else f"{cache.blocks_done} of {cache.blocks} blocks"
    when = "-" if cache.modified is None else cache.modified[:16].replace("T", " ")
    return (
        cache.dataset,
        cache.split,
        cache.model,
        cache.layers,
        str(cache.frames),
        cache.views,
        human_bytes(cache.nbytes),
        complete,
        cache.owner or "-",
        when,
        cache.place,
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADINGS, *rows)
    ]
