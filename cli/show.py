"""`evl-cache show`."""

from pathlib import Path

import click

from evl_cache.extract_options import Role, options_with

from .common import Command, check_file_to_write, default_device, existing_lines, print_json, say
from .extract_flags import decoding_of, extract_flags

EXAMPLES = """
evl-cache show "clip 3.mp4" --cache caches/mine --run runs/fold1 --out clip.png
evl-cache show "videos/clip 3.mp4" --run runs/fold1
evl-cache show --page page --run runs/fold1 --cache caches/mine --clips-each 3
"""


@click.command(cls=Command, name="show", examples=EXAMPLES)
@click.argument("clip", required=False)
@click.option("--cache", type=click.Path(path_type=Path), help="Cache that holds the clip.")
@click.option("--run", type=click.Path(path_type=Path), help="Run whose head is looked at.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="show.png", show_default=True, help="Picture."
)
@click.option("--view", type=click.IntRange(0), default=0, show_default=True, help="Which view of the clip.")
@click.option("--layer", type=click.IntRange(1), help="Block whose maps give the arrows [mean of all].")
@click.option("--best", is_flag=True, help="The head of the run's best epoch, not of its last.")
@click.option(
    "--page", type=click.Path(path_type=Path), help="Folder for a page of a run's wrongest and surest clips."
)
@click.option(
    "--clips-each",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="With --page: so many right, so many wrong.",
)
@click.option(
    "--clips",
    type=click.Path(path_type=Path, exists=True),
    help="Ids or paths, a line each, for the page [all].",
)
@click.option("--model", help="Where the run's tower is now [as the run says].")
@click.option("--pretrained", help="Where its weights are now [as the run says].")
@extract_flags(
    option for option in options_with(Role.DECODING) if option.kind is not int
)  # one clip at a time
@click.option("--device", help="cpu, cuda, cuda:N [the GPU where there is one].")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    clip: str | None,
    cache: Path | None,
    run: Path | None,
    out: Path,
    view: int,
    layer: int | None,
    best: bool,
    page: Path | None,
    clips_each: int,
    clips: Path | None,
    model: str | None,
    pretrained: str | None,
    decoder: str,
    tolerate_bad_frames: bool,
    clip_timeout: float | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Frames, motion by adjacent-frame attention, and the decoder's attention, as a PNG.

    CLIP is a clip of a cache (--cache), or a video (with --run). With --page: a page of clips.
    """
    from evl_cache.errors import UsageError
    from evl_cache.show.page import cache_of_run, show_page
    from evl_cache.show.view import ShowRun, show_cached, show_video
    from evl_cache.store import FeatureCache

    if (clip is None) == (page is None):
        raise UsageError("show takes a CLIP, or --page FOLDER with --run; give one of them")
    if page is None:
        check_file_to_write("--out", out)
    opened = None if run is None else ShowRun.read(run, best=best)
    if opened is None and (page is not None or cache is None):
        raise UsageError(f"{'--page' if page else 'a video'} needs --run; a clip of a cache needs --cache")
    device = default_device(device)
    how = decoding_of(device, decoder, tolerate_bad_frames, clip_timeout)
    if page is not None:
        assert opened is not None
        source = cache_of_run(opened) if cache is None else FeatureCache(cache)
        rows = None
        if clips is not None:
            from evl_cache.clips import select

            rows = select(source.clips, existing_lines(clips), source=str(clips))
        made = show_page(opened, source, page, each=clips_each, clips=rows, device=device, **how)
    elif cache is not None:
        assert clip is not None
        show_cached(FeatureCache(cache), clip, out, run=opened, view=view, layer=layer, **how)
        made = out
    else:
        assert clip is not None and opened is not None
        show_video(
            Path(clip), out, run=opened, view=view, layer=layer,
            device=device, model=model, pretrained=pretrained, **how,
        )  # fmt: skip
        made = out
    if as_json:
        print_json({"written": str(made)})
    else:
        say(made)
    return 0
