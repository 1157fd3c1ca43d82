"""Read the rendered benchmarks *scenes* and *motions*, after drawing the clips that are not there yet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evl_cache.clips import ClipList
from evl_cache.datasets.folder import read_class_folders
from evl_cache.rendered import begun_options, is_rendered, render

RENDERED_VIEWS: Mapping[str, Any] = {"frames": 8, "sampling": "strided", "stride": 2}


def read_rendered(
    root: Path, *, name: str, annotations: Path | None, split: str | None
) -> dict[str, ClipList]:
    """Return the clip lists of a rendered benchmark by split; clips that are missing are drawn first.

    Raises: UsageError for annotations, an unknown split, or a root that holds something else.
    """
    if annotations is None and not is_rendered(root):
        render(name, root, options=begun_options(root))
    return read_class_folders(root, dataset=name, annotations=annotations, split=split)
