"""`evl-cache verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import click

from .common import Command, print_json, say

EXAMPLES = """
evl-cache verify caches/mine
evl-cache verify caches/mine --sources
"""


class _Sources(NamedTuple):
    """What is wrong with the videos, or not known of them, and the clips that may have other frames than they claim."""

    sources: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


@click.command(cls=Command, name="verify", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--threads", type=click.IntRange(1), default=2, show_default=True, help="Blocks checked at a time."
)
@click.option(
    "--sources",
    "--check-sources",
    "check_sources",
    is_flag=True,
    help="Compare every video with the one in its mark, too, and tell which clips may have wrong frames.",
)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the videos [where they were].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(cache: Path, threads: int, check_sources: bool, root: Path | None, as_json: bool) -> int:
    """Prove every byte of a cache against its marks and manifest; exit status 1 where damage is found.

    Agreement, not authenticity: compare the cache digest with one you trust.
    """
    from evl_cache.store import verify_cache

    found = verify_cache(cache, threads=threads)
    sources = _sources(cache, root, threads) if check_sources else _Sources()
    if as_json:
        print_json({"cache": str(cache), **asdict(found), **sources._asdict()})
    else:
        for reason in sources.sources:
            say(f"source: {reason}", err=True)
        for reason in sources.doubtful:
            say(f"doubtful: {reason}", err=True)
        for problem in found.problems:
            say(f"damaged: {problem.reason}", err=True)
        for stray in found.strays:
            say(f"stray: {cache / stray} belongs to no block", err=True)
        told = f", {len(sources.doubtful)} clips doubtful" if sources.doubtful else ""
        say(
            f"{cache}: {found.blocks_done} of {found.blocks} blocks done and intact, {len(found.problems)} problems{told}; "
            f"digest {found.cache_digest or '(not complete)'}"
        )
        if sources.doubtful:
            say(
                "doubtful clips may have other frames than they claim; extract --retry-doubtful makes them again",
                err=True,
            )
    return 1 if found.problems or sources.sources or sources.doubtful else 0


def _sources(cache: Path, root: Path | None, threads: int) -> _Sources:
    from evl_cache.errors import UsageError
    from evl_cache.extract.doubts import DoubtCheck, check_doubts, has_older_frames
    from evl_cache.extract.sources import check_sources
    from evl_cache.store import FeatureCache, cache_parts, read_clips
    from evl_cache.video.pool import DecodePool

    opened = FeatureCache(cache)
    given = root or opened.origin.get("root")
    if not given:
        raise UsageError("the cache does not tell where its videos lie; give --root")
    videos = Path(str(given))
    wrong: list[str] = []
    doubtful: list[str] = []
    for part in cache_parts(cache).parts:
        place = (part.path, part.spec, read_clips(part.path, part.description), videos)
        found = check_sources(*place, prove=True)
        doubts = DoubtCheck()
        if has_older_frames(part.path, part.spec):
            with DecodePool(threads) as pool:
                doubts = check_doubts(*place, sources=found, doubt=pool.doubt, threads=threads)
        wrong += [*found.changed.values(), *found.unproved.values(), *doubts.untold.values()]
        doubtful += doubts.doubtful.values()
    return _Sources(sources=tuple(dict.fromkeys(wrong)), doubtful=tuple(dict.fromkeys(doubtful)))
