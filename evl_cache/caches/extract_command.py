"""The extract command that makes a cache like another one."""

from collections.abc import Mapping
from types import MappingProxyType

from evl_cache.caches.places import FoundCache
from evl_cache.clips import TRAIN_SPLITS, fold_of
from evl_cache.extract_options import EXTRACT_OPTIONS, Role, kept_values
from evl_cache.notation import command_line
from evl_cache.spec import CacheSpec

_UNDIVIDED = "all"  # the split of a data set without splits, which no option names


def extract_command(
    cache: FoundCache,
    *,
    split: str | None,
    layers: str,
    maps: str | None = None,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> str | None:
    """Return the extract command that makes a cache like another one, of another split, other layers or maps.

    A shell reads it as those words and nothing else, whatever the cache's names hold. The spec tells most of it; the rest
    is what the cache's origin keeps, which caches of older versions and of strangers may lack.

    Args:
        split: as a spec has it; None makes all there are.
        environ: of the shell it is for; its variables for options that the command does not name are unset.

    Returns: None where a name in it cannot be shown, or no option says what the cache holds.
    """
    spec, kept = cache.spec, kept_values(cache.origin)
    if is_undivided(cache):
        split = split or spec.split
    if not _options_tell(cache, split):
        return None
    values = {
        "model": spec.tower.model,
        "pretrained": spec.tower.pretrained,
        **kept,
        **_places(cache, kept, split),
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
    words, unset = ["evl-cache", "extract"], []
    for option in EXTRACT_OPTIONS:
        value = values.get(option.field)
        # What the spec tells is named even where it is the default, as a variable may hold another one.
        if told := option.words(value):
            words += told
        elif option.role & Role.REQUEST or option.field == "decoder":
            for variable in filter(environ.get, option.variables):
                unset += ["-u", variable]
    return command_line(["env", *unset, *words] if unset else words)


def run_command(command: str | None) -> str:
    """Return the remedy of an error: to run the command, or what to do where there is none to show."""
    return f"run {command}" if command else "extract it: no command line can show how"


def is_undivided(cache: FoundCache) -> bool:
    """Whether what a cache was made from holds no other split: a list, a folder without splits, a file of one split."""
    is_list = cache.spec.dataset == "list" and cache.origin.get("is_divided_list") is not True
    is_alone = is_list or cache.spec.split == _UNDIVIDED
    return is_alone or cache.origin.get("is_undivided") is True


def _options_tell(cache: FoundCache, split: str | None) -> bool:
    """Whether options give the views of a split; some that Python gives they do not."""
    if cache.origin.get("is_apart") is True and split != cache.spec.split:
        return False
    return not cache.spec.views.train_views or cache.spec.split in TRAIN_SPLITS


def _places(cache: FoundCache, kept: Mapping[str, object], split: str | None) -> dict[str, object]:
    """Return the file or folder that only the user knows, if any: of another split, or not kept by older versions."""
    is_list, is_other = cache.spec.dataset == "list", is_undivided(cache) and split != cache.spec.split
    if is_list:
        return {} if "list_path" in kept and not is_other else {"list_path": "FILE"}
    if is_other:
        return {"annotations": "FILE"} if "annotations" in kept else {"root": "FOLDER"}
    return {}


def _split(split: str | None, *, asked: object) -> str | None:
    """The split to name; with the fold that was asked for, of data sets that have several: `train2`, or `2` for both."""
    fold = fold_of(asked)
    return f"{'' if split in (None, _UNDIVIDED) else split}{fold if fold > 1 else ''}" or None


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
        "sampling": views.sampling,
        "stride": views.stride,
        "views": crops,
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
