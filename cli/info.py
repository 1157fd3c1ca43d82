"""`evl-cache info`."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evl_cache.notation import command_line

from .common import Command, human_bytes, human_seconds, print_json, shown, write_csv

if TYPE_CHECKING:
    from evl_cache.caches.watch import Look

_MOST_MARKS = 200  # that are read where nobody asks: it should answer at once, on network disks too
EXAMPLES = """
evl-cache info caches/mine
evl-cache info caches/mine --json
evl-cache info caches/mine --failures --csv
evl-cache info caches/mine --watch
"""


@click.command(cls=Command, name="info", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--failures", is_flag=True, help="Which clips failed, by reason.")
@click.option("--csv", "as_csv", is_flag=True, help="The failures as CSV: clip, kind, reason.")
@click.option(
    "--watch", "watched", is_flag=True, help="How far extraction is, by all jobs, until it is done."
)
@click.option("--every", type=click.FloatRange(0, min_open=True), default=5.0, metavar="SECONDS", help="[5]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON; with --watch a line a look.")
def command(cache: Path, failures: bool, as_csv: bool, watched: bool, every: float, as_json: bool) -> int:
    """What a cache holds, how complete it is, and which clips failed."""
    from evl_cache.caches.info import describe, failed_clips_by_reason
    from evl_cache.errors import UsageError
    from evl_cache.store import FeatureCache

    if as_json and (failures or as_csv):
        raise UsageError("--json with --failures or --csv; its report holds the failures: leave them out")
    if failures or as_csv:
        _show_failures(failed_clips_by_reason(FeatureCache(cache)), as_csv=as_csv)
        return 0
    if watched:
        _watch(cache, every, as_json=as_json)
        return 0
    found = describe(cache, most_marks=math.inf if as_json else _MOST_MARKS)
    if as_json:
        print_json(found)
        return 0
    for line in _lines(found):
        click.echo(shown(line))
    return 0


def _watch(cache: Path, every_s: float, *, as_json: bool) -> None:
    from evl_cache.caches.watch import watch
    from evl_cache.canonical_json import json_text

    for look in watch(cache, every_s=every_s):
        if as_json:
            click.echo(json_text(asdict(look)))
            continue
        again = sys.stdout.isatty() and not look.is_complete  # one line that is written over
        click.echo(("\r\x1b[K" if sys.stdout.isatty() else "") + shown(_look_line(look)), nl=not again)


def _look_line(look: Look) -> str:
    at_work = ", ".join(f"{host} {count}" for host, count in sorted(look.in_hand.items()))
    rate = "" if look.clips_per_s is None else f", {look.clips_per_s:.1f} clips/s"
    left = "" if not look.seconds_left else f", {human_seconds(look.seconds_left)} left"
    return (
        f"{look.clips_done + look.clips_failed} of {look.clips} clips, {look.clips_failed} failed; "
        f"blocks {look.blocks_done} of {look.blocks}{rate}{left}{'; in hand: ' + at_work if at_work else ''}"
    )


def _show_failures(failures: dict[str, list[tuple[str, str]]], *, as_csv: bool) -> None:
    if as_csv:
        rows = ((clip, kind, reason) for kind, clips in failures.items() for clip, reason in clips)
        write_csv(sys.stdout, [("clip", "kind", "reason"), *rows])
        return
    for kind, clips in failures.items():
        click.echo(shown(f"{len(clips)} x {kind}"))
        for clip, _ in clips:
            click.echo(shown(f"    {clip}"))


def _more_layers(found: dict[str, Any]) -> str:
    more = sorted(set(found["stored_layers"]) - set(found["spec"]["layers"]))
    return f" (and tokens of {', '.join(map(str, more))}, for maps)" if more else ""


def _frames(found: dict[str, Any]) -> str:
    from evl_cache.caches.info import FramesFound

    frames = FramesFound(**found["frames"])
    look = command_line(("evl-cache", "verify", "--sources"), found["path"]) or "verify --sources"
    return frames.told() + (f"; see {look}" if frames.by_older_rule else "")


def _lines(found: dict[str, Any]) -> list[str]:
    spec = found["spec"]
    tower, views = spec["tower"], spec["views"]
    sampling = (
        views["sampling"] if views["stride"] is None else f"{views['sampling']}, stride {views['stride']}"
    )
    lines = [
        f"{found['path']}: {spec['dataset']} {spec['split']}, {spec['num_clips']} clips of {len(spec['classes'])} classes",
        f"  tower     {tower['model']} ({tower['pretrained']}, weights {tower['weights_sha256'][:12]})",
        f"  layers    {spec['layers']}{_more_layers(found)}, width {tower['width']}, grid {found['grid'][0]}x{found['grid'][1]}",
        f"  views     {views['temporal_views']}x{views['spatial_views']} of {views['frames']} frames ({sampling})",
        f"  storage   tokens {spec['tokens']}, maps {spec['maps']}, codec {spec['codec']}; computed in {spec['compute_dtype']}",
        f"  size      {human_bytes(found['bytes'])} in {found['files']} files",
        f"  blocks    {found['blocks_done']} of {found['blocks']} done",
        f"  clips     {found['clips_done']} done, {found['clips_failed']} failed",
        f"  digest    {found['cache_digest']}"
        + ("" if found["is_complete"] else " (of the blocks done so far)"),
        f"  frames    {_frames(found)}",
        f"  made with {', '.join(f'{name} {version}' for name, version in found['created_with'].items())}",
    ]
    if short := found["short_clips"]:
        lines.append(
            f"  short     {short} of {found['clips_done']} clips have fewer frames than a view lies over: their views "
            "repeat frames (docs/own-videos.md)"
        )
    lines += [f"  added     {told}" for told in found["additions"]]
    lines += [f"  failed    {count} x {reason}" for reason, count in found["failures_by_reason"].items()]
    return lines + [f"  damaged   {reason}" for reason in found["damaged_marks"]]
