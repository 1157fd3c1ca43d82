"""`evl-cache push`."""

from pathlib import Path

import click

from evl_cache.progress_lines import block_progress
from evl_cache.spec import CODECS

from .common import Command, show_transfer
from .mode_option import mode_option

EXAMPLES = """
evl-cache push caches/k400-train-1f3a9c2e /shared/caches/
evl-cache push caches/k400-train-1f3a9c2e s3://lab/caches/k400-train-1f3a9c2e
"""


@click.command(cls=Command, name="push", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("target")
@click.option("--layers", metavar="9-12", help="Only these [all], to a directory.")
@click.option("--codec", type=click.Choice(CODECS), help="Store it so [as it is], in a directory.")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="Blocks at a time.")
@mode_option
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    cache: Path, target: str, layers: str | None, codec: str | None, threads: int, as_json: bool
) -> int:
    """Copy a cache to a directory or to s3://bucket/prefix: only blocks that differ, the manifest last.

    A TARGET that ends with / is what the cache is put into. Killed, run it again: it goes on.
    """
    from evl_cache.caches.share import push
    from evl_cache.notation import parse_layers

    with block_progress("push") as on_block:
        result = push(
            cache,
            target,
            layers=None if layers is None else parse_layers(layers),
            codec=codec,
            threads=threads,
            on_block=on_block,
        )
    show_transfer(result, as_json)
    return 0
