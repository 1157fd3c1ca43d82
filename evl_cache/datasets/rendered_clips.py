"""*scenes* and *motions*: drawn where they are not there yet, and read as the folder that they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evl_cache.clips import ClipList
from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.places import normal_split
from evl_cache.errors import UsageError
from evl_cache.rendered import begun_options, is_rendered, render

RENDERED_VIEWS: Mapping[str, Any] = {"frames": 8, "sampling": "strided", "stride": 2}


def read_rendered(
    name: str, root: Path, *, annotations: Path | None, split: str | None
) -> dict[str, ClipList]:
    """Clip lists of a rendered benchmark; its clips are drawn first, or those that an interruption left out.

    Raises: UsageError for annotations, an unknown split, or a root that holds something else.
    """
    if annotations is not None:
        raise UsageError(
            f"--annotations {annotations} with --dataset {name}; the folders are the labels: leave it out"
        )
    if not is_rendered(root):
        render(name, root, options=begun_options(root))
    lists = read_folder(root)
    if split is None:
        return lists
    wanted = normal_split(split)
    if wanted not in lists:
        raise UsageError(f"{root}: no split {wanted}; expected one of {', '.join(lists)} as --split")
    return {wanted: lists[wanted]}
