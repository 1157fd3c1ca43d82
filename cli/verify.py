"""`evl-cache verify`."""

from dataclasses import asdict
from pathlib import Path

import click

from .common import Command, print_json

EXAMPLES = """
evl-cache verify caches/mine
"""


@click.command(cls=Command, name="verify", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--threads", type=click.IntRange(1), default=2, show_default=True, help="Blocks checked at a time."
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(cache: Path, threads: int, as_json: bool) -> int:
    """Prove every byte of a cache against its marks and manifest; exit status 1 where damage is found.

    Agreement, not authenticity: compare the cache digest with one you trust.
    """
    from evl_cache.store import verify_cache

    found = verify_cache(cache, threads=threads)
    if as_json:
        print_json({"cache": str(cache), **asdict(found)})
    else:
        for problem in found.problems:
            click.echo(f"damaged: {problem.reason}", err=True)
        for stray in found.strays:
            click.echo(f"stray: {cache / stray} belongs to no block", err=True)
        click.echo(
            f"{cache}: {found.blocks_done} of {found.blocks} blocks done and intact, {len(found.problems)} problems; "
            f"digest {found.cache_digest or '(not complete)'}"
        )
    return 1 if found.problems else 0
