"""An official EVL checkpoint becomes a run, so that eval and predict take it like any other."""

from pathlib import Path

from evl_cache.errors import UsageError
from evl_cache.heads import EVLHead
from evl_cache.runs.directory import RunConfig, RunFile, check_no_others_files, write_run_config
from evl_cache.runs.head_files import save_head
from evl_cache.runs.official_checkpoint import load_official_checkpoint
from evl_cache.runs.writer import writing


def import_head(
    checkpoint: str | Path,
    out: str | Path,
    *,
    num_heads: int | None = None,
    layers: tuple[int, ...] | None = None,
    classes: tuple[str, ...] | None = None,
) -> EVLHead:
    """Write a run whose head gives the official model's logits.

    Args:
        layers: that the head reads; by default the last ones of the cache it is used with, as published.
        classes: names; numbers by default.

    Raises: WeightsError where the file is no such checkpoint; UsageError where `out` holds a run, or counts
        do not match.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    head = load_official_checkpoint(checkpoint, num_heads)
    depth, num_classes = len(head.layers), head.classifier.out_features
    if layers is not None and len(layers) != depth:
        raise UsageError(
            f"{checkpoint}: has {depth} decoder layers, --head-layers names {len(layers)}; make them equal"
        )
    if classes is not None and len(classes) != num_classes:
        raise UsageError(
            f"{checkpoint}: has {num_classes} classes, {len(classes)} names were given; make them equal"
        )
    if classes is not None and len({*classes}) != num_classes:
        twice = next(name for place, name in enumerate(classes) if name in classes[:place])
        raise UsageError(f"{checkpoint}: two classes would be called {twice!r}; give each a name of its own")
    config = RunConfig(
        head=f"decoder{depth}",
        head_config={**head.config, "grid": list(head.grid)},
        layers=layers,
        classes=classes or tuple(str(i) for i in range(num_classes)),
        features=None,
        training={"imported_from": checkpoint.name},
        caches={},
    )
    with writing(out):
        if (out / RunFile.CONFIG).exists():
            raise UsageError(f"{out} holds a run already; choose another --out")
        check_no_others_files(out)
        write_run_config(out, config)
        save_head(out, head)
    return head
