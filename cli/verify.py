"""`evl-cache verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from evl_cache.progress_lines import verify_progress

from .common import Command, print_json, say

if TYPE_CHECKING:
    from evl_cache.store import Verification

EXAMPLES = """
evl-cache verify caches/mine
evl-cache verify caches/mine --sample 5%
evl-cache verify caches/mine --sources
evl-cache verify https://lab.example.org/caches/k400-train-1f3a9c2e --sample 5%
"""


class _Percent(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A share in per cent, with its sign or without."""

    name = "N%"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            percent = float(str(value).strip().removesuffix("%"))
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:  # nor what is no number
            self.fail(
                f"{value!r} is no share of the blocks; expected more than 0 and at most 100, such as 5%"
            )
        return percent


class _Sources(NamedTuple):
    """What is wrong with the videos, or not known of them, and the clips that may have other frames than they claim."""

    sources: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


@click.command(cls=Command, name="verify", examples=EXAMPLES)
@click.argument("cache")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Files read at a time [as many as there are processors]."
)
@click.option("--sample", type=_Percent(), help="Read the features of so many of the blocks only [all].")
@click.option(
    "--seed", type=click.IntRange(0), help="Draw the same blocks again with --sample [others each time]."
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
def command(
    cache: str,
    threads: int | None,
    sample: float | None,
    seed: int | None,
    check_sources: bool,
    root: Path | None,
    as_json: bool,
) -> int:
    """Prove every byte of a cache, here or at s3:// or http(s)://; exit status 1 where damage is found.

    Agreement of marks, manifest and files, not authenticity: compare the cache digest with one you trust. With --sample
    marks, manifest, index and description are proved wholly, and the exit status tells of what was read.
    """
    from evl_cache.errors import UsageError
    from evl_cache.processes import usable_cpus
    from evl_cache.store import Sample, is_url, public_text, verify_cache

    if seed is not None and sample is None:
        raise UsageError("--seed draws the blocks of --sample: give both, or neither")
    place = public_text(cache)
    if check_sources and is_url(cache):
        raise UsageError(
            f"{place}: --sources compares videos with the marks of a cache in a directory; pull the cache, then verify that"
        )
    drawn = None if sample is None else Sample(percent=sample, seed=seed)
    threads = threads or usable_cpus()
    with verify_progress("verify", shown=not as_json) as on_progress:
        found = verify_cache(cache, threads=threads, sample=drawn, on_progress=on_progress)
    sources = _sources(Path(cache), root, threads) if check_sources else _Sources()
    if as_json:
        print_json({"cache": place, **asdict(found), **sources._asdict()})
    else:
        for reason in sources.sources:
            say(f"source: {reason}", err=True)
        for reason in sources.doubtful:
            say(f"doubtful: {reason}", err=True)
        for problem in found.problems:
            say(f"damaged: {problem.reason}", err=True)
        for stray in found.strays:
            say(f"stray: {Path(cache) / stray} belongs to no block", err=True)
        told = f", {len(sources.doubtful)} clips doubtful" if sources.doubtful else ""
        say(f"{place}: {_blocks(found)}, {len(found.problems)} problems{told}; {_digest(found)}")
        if sources.doubtful:
            say(
                "doubtful clips may have other frames than they claim; extract --retry-doubtful makes them again",
                err=True,
            )
    return 1 if found.problems or sources.sources or sources.doubtful else 0


def _blocks(found: Verification) -> str:
    if found.sampled_blocks is None:
        return f"{found.blocks_done} of {found.blocks} blocks done and intact"
    done = "" if found.blocks_done == found.blocks else f"{found.blocks_done:,} blocks done; "
    return f"{done}of {found.blocks:,} blocks {found.sampled_blocks:,} were read"


def _digest(found: Verification) -> str:
    if found.cache_digest is None:
        return "digest (not complete)"
    is_part = found.sampled_blocks is not None and found.sampled_blocks < found.blocks
    return f"digest {found.cache_digest}" + (" by the manifest: not all files were read" if is_part else "")


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
