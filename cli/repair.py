"""`evl-cache repair`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evl_cache.extract_options import Role, options_with
from evl_cache.progress_lines import clip_progress, verify_progress

from .common import Command, default_device, print_json, say, say_outage
from .extract_flags import decoding_of, extract_flags

if TYPE_CHECKING:
    from evl_cache.extract.repair import RepairResult

EXAMPLES = """
evl-cache repair caches/mine
evl-cache repair caches/mine --root /data/videos --pretrained ViT-B-16.pt
"""


@click.command(cls=Command, name="repair", examples=EXAMPLES)
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the videos [where they were].")
@click.option("--model", help="Model or JSON file [as extracted].")
@click.option("--pretrained", help="Weights [as extracted].")
@click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one].")
@extract_flags(options_with(Role.DECODING))
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    cache: Path,
    root: Path | None,
    model: str | None,
    pretrained: str | None,
    device: str | None,
    decode_workers: int | None,
    decoder: str,
    tolerate_bad_frames: bool,
    clip_timeout: float | None,
    as_json: bool,
) -> int:
    """Verify a cache and redo only what is damaged; on the same machine the bytes become what they were."""
    from evl_cache.extract.job import ExtractOptions
    from evl_cache.extract.repair import load_tower, repair

    device = default_device(device)
    options = ExtractOptions(
        device=device,
        decode_workers=decode_workers,
        **decoding_of(device, decoder, tolerate_bad_frames, clip_timeout),
    )
    with (
        verify_progress("verify", shown=not as_json) as on_progress,
        clip_progress(0, "repair", shown=not as_json) as on_clip,
    ):
        result = repair(
            cache,
            tower=partial(load_tower, model=model, pretrained=pretrained),
            root=root,
            options=options,
            on_clip=on_clip,
            on_outage=say_outage,
            on_progress=on_progress,
        )
    if as_json:
        print_json({"cache": str(cache), **asdict(result)})
    else:
        _render(cache, result)
    for reason in result.not_redone:
        say(reason, err=True)
    return 1 if result.not_redone else 0


def _render(cache: Path, result: RepairResult) -> None:
    for problem in result.problems:
        say(f"was damaged: {problem.reason}", err=True)
    if result.blocks_redone and result.environment_differs:
        say(
            f"the cache digest changes, features agree within rounding only: {'; '.join(result.environment_differs)}",
            err=True,
        )
    say(
        f"{cache}: {len(result.problems)} problems, {len(result.files_restored)} files restored, "
        f"{len(result.blocks_redone)} blocks redone; digest {result.cache_digest_after or '(not complete)'}"
    )
