"""`evl-cache verify`."""

from dataclasses import asdict
from pathlib import Path

import click

from .common import Command, print_json, shown

EXAMPLES = """
evl-cache verify caches/mine
"""


@click.command(cls=Command, name="verify", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--threads", type=click.IntRange(1), default=2, show_default=True, help="Blocks checked at a time."
)
@click.option("--check-sources", is_flag=True, help="Compare every video with the one in its mark, too.")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the videos [where they were].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(cache: Path, threads: int, check_sources: bool, root: Path | None, as_json: bool) -> int:
    """Prove every byte of a cache against its marks and manifest; exit status 1 where damage is found.

    Agreement, not authenticity: compare the cache digest with one you trust.
    """
    from evl_cache.store import verify_cache

    found = verify_cache(cache, threads=threads)
    sources = _sources(cache, root) if check_sources else ()
    if as_json:
        print_json({"cache": str(cache), **asdict(found), "sources": sources})
    else:
        for reason in sources:
            click.echo(f"source: {shown(reason)}", err=True)
        for problem in found.problems:
            click.echo(f"damaged: {problem.reason}", err=True)
        for stray in found.strays:
            click.echo(f"stray: {cache / stray} belongs to no block", err=True)
        click.echo(
            f"{cache}: {found.blocks_done} of {found.blocks} blocks done and intact, {len(found.problems)} problems; "
            f"digest {found.cache_digest or '(not complete)'}"
        )
    return 1 if found.problems or sources else 0


def _sources(cache: Path, root: Path | None) -> tuple[str, ...]:
    """What differs of the videos, and which cannot be compared."""
    from evl_cache.errors import UsageError
    from evl_cache.extract.sources import check_sources
    from evl_cache.store import FeatureCache

    opened = FeatureCache(cache)
    videos = root or opened.origin.get("root")
    if not videos:
        raise UsageError("the cache does not tell where its videos lie; give --root")
    found = check_sources(cache, opened.spec, opened.clips, Path(str(videos)), prove=True)
    return (*found.changed.values(), *found.unproved)
