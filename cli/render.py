"""`evl-cache render`."""

from pathlib import Path

import click

from evl_cache.progress_lines import clip_progress

from .common import Command, say

EXAMPLES = """
evl-cache render motions --root data/motions
evl-cache render scenes --root data/scenes-hard --difficulty hard --train-clips 200
"""


@click.command(cls=Command, name="render", examples=EXAMPLES)
@click.argument("name", type=click.Choice(["scenes", "motions"]))
@click.option("--root", type=click.Path(path_type=Path), required=True, help="Folder to write them to.")
@click.option(
    "--difficulty", type=click.Choice(["easy", "normal", "hard"]), default="normal", show_default=True
)
@click.option("--train-clips", type=click.IntRange(1), default=100, show_default=True, help="Of each class.")
@click.option("--val-clips", type=click.IntRange(1), default=30, show_default=True, help="Of each class.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Other clips by another N."
)
@click.option("--side", type=int, default=96, show_default=True, help="Pixels.")
@click.option("--clip-frames", type=int, default=16, show_default=True, help="Frames of a clip.")
def command(
    name: str,
    root: Path,
    difficulty: str,
    train_clips: int,
    val_clips: int,
    seed: int,
    side: int,
    clip_frames: int,
) -> int:
    """Draw a benchmark's clips: H.264 files by seed, in class folders.

    scenes: what is in the picture decides. motions: only order and displacement do.
    Run it again after a kill: it goes on. Then: evl-cache extract --dataset NAME --root FOLDER.
    """
    from evl_cache.rendered.benchmarks import BENCHMARKS, RenderOptions, render

    options = RenderOptions(
        difficulty=difficulty,
        clips_per_class={"train": train_clips, "val": val_clips},
        seed=seed,
        side=side,
        num_frames=clip_frames,
    )
    total = len(BENCHMARKS[name].classes) * (train_clips + val_clips)
    with clip_progress(total, f"render {name}") as on_clip:
        render(name, root, options=options, on_clip=lambda done, all_of_them: on_clip(False))
    say(f"{root}: {total} clips of {len(BENCHMARKS[name].classes)} classes")
    return 0
