"""The extract command that makes a cache like another one."""

import re
from collections.abc import Mapping

from evl_cache.caches.places import FoundCache
from evl_cache.clips import TRAIN_SPLITS
from evl_cache.extract_options import EXTRACT_OPTIONS, kept_values
from evl_cache.notation import command_line
from evl_cache.spec import CacheSpec

_UNDIVIDED = "all"  # the split of a data set without splits, which no option names


def extract_command(
    cache: FoundCache, *, split: str | None, layers: str, maps: str | None = None
) -> str | None:
    """Return the extract command that makes a cache like another one, of another split, other layers or maps.

    A shell reads it as those words and nothing else, whatever the cache's names hold. The spec tells most of it; the rest
    is what the cache's origin keeps, which caches of older versions and of strangers may lack.

    Args:
        split: as a spec has it; None makes all there are.

    Returns: None where a name in it cannot be shown.
    """
    spec, kept = cache.spec, kept_values(cache.origin)
    if "list_path" in kept:  # a list is of one split: that of another one is a file that only the user knows
        split = split or spec.split
        kept |= {} if split == spec.split else {"list_path": "FILE"}
    values = {
        "model": spec.tower.model,
        "pretrained": spec.tower.pretrained,
        **kept,
        "dataset": spec.dataset,
        "split": _split(split, asked=kept.get("split")),
        "layers": layers,
        **_views(spec, kept, split),
        "tokens": spec.tokens,
        "maps": maps or spec.maps,
        "codec": spec.codec,
        "compute_dtype": spec.compute_dtype,
        **_decoder(spec.pixels),
    }
    words = ["evl-cache", "extract"]
    for option in EXTRACT_OPTIONS:
        value = values.get(option.field)
        # The tower is always named: $EVL_CACHE_EXTRACT_MODEL may name another one.
        if value != option.default or option.field == "model":
            words += option.words(value)
    return command_line(words)


def run_command(command: str | None) -> str:
    """Return the remedy of an error: to run the command, or what to do where it cannot be shown."""
    return f"run {command}" if command else "extract it: the command holds names that cannot be shown"


def _split(split: str | None, *, asked: object) -> str | None:
    """The split to name; with the fold that was asked for, of data sets that have several: `train2`, or `2` for both."""
    fold = re.search(r"[1-3]$", asked) if isinstance(asked, str) else None
    name = "" if split in (None, _UNDIVIDED) else split
    return f"{name}{fold[0] if fold else ''}" or None


def _views(spec: CacheSpec, kept: Mapping[str, object], split: str | None) -> dict[str, object]:
    """Values of the options of views, for one split or for all.

    The spec tells of the cache's own side, train or validation; where the other one has other views, the origin tells.
    """
    views, augmentation = spec.views, ("train_views", "augment_seed", "flip")
    if spec.split in TRAIN_SPLITS:
        augmented = {name: getattr(views, name) for name in augmentation}
        train_crops, crops = views.crops, kept.get("views", views.crops)
    else:
        augmented = {name: kept.get(name) for name in augmentation}
        train_crops, crops = "1x1" if "views" in kept else views.crops, views.crops
    if split in TRAIN_SPLITS:
        crops = train_crops
    is_augmented = bool(augmented["train_views"]) and split in (None, *TRAIN_SPLITS)
    # A recipe's training views are centre crops, which no other option gives beside several of validation.
    recipe = kept.get("recipe") if split is None and not is_augmented and train_crops != crops else None
    return {
        "recipe": recipe,
        "frames": views.frames,
        "sampling": views.sampling if recipe or views.stride is None else None,
        "stride": views.stride,
        "views": crops if recipe or crops != "1x1" else None,
        **{name: value if is_augmented and value else None for name, value in augmented.items()},
    }


def _decoder(pixels: object) -> dict[str, object]:
    """Values of the options that give the pixels of a cache; none for the usual ones."""
    decoder, _, device = str(pixels).partition("-")
    return (
        {"decoder": decoder, "device": device}
        if decoder == "torchcodec" and device in ("cpu", "cuda")
        else {}
    )
