"""`evl-cache import-head`."""

from pathlib import Path

import click

from .common import Command, say

EXAMPLES = """
evl-cache import-head k400_vitb16_8f_dec4x768.pth --out runs/official
evl-cache eval --cache caches/mine --run runs/official
"""


@click.command(cls=Command, name="import-head", examples=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory to write.")
@click.option("--num-heads", type=click.IntRange(1), help="Decoder heads [width / 64].")
@click.option(
    "--head-layers", metavar="9-12", help="Blocks it reads [the last of the cache it is used with]."
)
@click.option(
    "--classes", type=click.Path(path_type=Path, exists=True), help="Class names, a line each [numbers]."
)
def command(
    checkpoint: Path, out: Path, num_heads: int | None, head_layers: str | None, classes: Path | None
) -> int:
    """Turn a checkpoint of the official EVL code into a run with the official model's logits."""
    from evl_cache.datasets.class_file import read_class_names
    from evl_cache.notation import parse_layers
    from evl_cache.runs.import_head import import_head

    head = import_head(
        checkpoint,
        out,
        num_heads=num_heads,
        layers=None if head_layers is None else parse_layers(head_layers),
        classes=None if classes is None else read_class_names(classes),
    )
    c = head.config
    say(
        f"{out}: decoder of {c['num_layers']} layers, {c['num_heads']} heads, width {c['width']}, "
        f"{c['num_frames']} frames, {c['num_classes']} classes"
    )
    return 0
