"""`evl-cache pull`."""

import click

from evl_cache.progress_lines import block_progress
from evl_cache.spec import CODECS

from .common import Command, show_transfer
from .mode_option import mode_option

EXAMPLES = """
evl-cache pull s3://lab/caches/k400-train-1f3a9c2e
evl-cache pull https://lab.example.org/caches/k400-train-1f3a9c2e /data/caches/ --layers 9-12 --codec raw
"""


@click.command(cls=Command, name="pull", examples=EXAMPLES)
@click.argument("source")
@click.argument("target", required=False)
@click.option("--layers", metavar="9-12", help="Only these [all]: a smaller cache of the same features.")
@click.option("--codec", type=click.Choice(CODECS), help="Store it so [as it is].")
@click.option("--threads", type=click.IntRange(1, 64), default=4, show_default=True, help="Blocks at a time.")
@mode_option
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    source: str, target: str | None, layers: str | None, codec: str | None, threads: int, as_json: bool
) -> int:
    """Copy a cache from a directory, s3:// or http(s)://: only blocks that differ, every digest proved.

    TARGET is the new cache's directory; with / at its end, what it is put into [$EVL_CACHE_ROOT].
    Killed, run it again: it goes on.
    """
    from evl_cache.caches.share import pull
    from evl_cache.notation import parse_layers

    with block_progress("pull") as on_block:
        result = pull(
            source,
            target,
            layers=None if layers is None else parse_layers(layers),
            codec=codec,
            threads=threads,
            on_block=on_block,
        )
    show_transfer(result, as_json)
    return 0
