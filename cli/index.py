"""`evl-cache index`."""

from __future__ import annotations

from pathlib import Path

import click

from .common import Command, print_json, say

EXAMPLES = """
evl-cache index caches/mine
"""


@click.command(cls=Command, name="index", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(cache: Path, as_json: bool) -> int:
    """Write the index of a complete cache, from which a large one opens in a second.

    Caches get one when extract finishes them; this adds it to those of older versions, and makes a damaged one again.
    Nothing else is changed, neither is the cache digest.
    """
    from evl_cache.store import INDEX_NAME, cache_parts, directory_of, grown_digest, index_cache

    parts = cache_parts(directory_of(cache)).parts
    cache_digest = grown_digest([index_cache(part.path, part.spec) for part in parts])
    nbytes = sum((part.path / INDEX_NAME).stat().st_size for part in parts)
    if as_json:
        print_json({"cache": str(cache), "cache_digest": cache_digest, "bytes": nbytes})
    else:
        say(f"{cache / INDEX_NAME}: {nbytes:,} bytes, digest {cache_digest}")
    return 0
