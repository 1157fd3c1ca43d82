"""Finding caches by what they hold, where a command does not name one."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evl_cache.batches import Source
from evl_cache.clips import select
from evl_cache.errors import CacheError, UsageError
from evl_cache.heads import head_layers as resolve_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache, read_clips, read_description

CACHE_ROOT_VARIABLE = "EVL_CACHE_ROOT"
TRAIN_SPLITS = ("train",)
VAL_SPLITS = ("val", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class FoundCache:
    """A cache's place and spec."""

    path: Path
    spec: CacheSpec


def cache_root() -> Path:
    """`$EVL_CACHE_ROOT`, or `./caches`."""
    return Path(os.environ.get(CACHE_ROOT_VARIABLE) or "caches")


def find_caches(root: Path) -> Iterator[FoundCache]:
    """Caches directly under a directory, by name. What is no cache, or damaged, is passed over."""
    for directory in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            yield FoundCache(path=directory, spec=read_description(directory).spec)
        except CacheError:
            continue


def find_pair(dataset: str | None, *, root: Path, fits: Callable[[CacheSpec], bool]) -> tuple[Path, Path]:
    """The one training cache (of a data set, where named) that fits, and its validation cache.

    Raises: UsageError where none fits, or several do (they are listed).
    """
    found = [c for c in find_caches(root) if dataset in (None, c.spec.dataset)]
    wanted = "caches" if dataset is None else f"caches of {dataset}"
    if not found:
        raise UsageError(
            f"no {wanted} under {root}; run evl-cache extract --dataset {dataset or 'NAME'}, "
            f"or set {CACHE_ROOT_VARIABLE}"
        )
    pairs = [
        (t, v)
        for t in found
        if t.spec.split in TRAIN_SPLITS and fits(t.spec)
        for v in found
        if v.spec.split in VAL_SPLITS and _belong_together(t.spec, v.spec)
    ]
    if len(pairs) > 1:  # folds of one data set: what one trains on, another validates on
        pairs = [(t, v) for t, v in pairs if _clip_ids(t).isdisjoint(_clip_ids(v))]
    if len(pairs) == 1:
        return pairs[0][0].path, pairs[0][1].path
    listed = "; ".join(
        f"{c.path.name} ({c.spec.dataset} {c.spec.split}, {c.spec.tower.model}, layers {list(c.spec.layers)})"
        for c in found
    )
    if not pairs:
        raise UsageError(
            f"no pair of train and validation {wanted} under {root} fits the head; there are: {listed}"
        )
    raise UsageError(f"several {wanted} under {root} fit; name one with --cache and --val-cache: {listed}")


def _clip_ids(found: FoundCache) -> frozenset[str]:
    return frozenset(clip.id for clip in read_clips(found.path, read_description(found.path)))


def _belong_together(train: CacheSpec, val: CacheSpec) -> bool:
    return (
        train.dataset == val.dataset
        and train.tower.weights_sha256 == val.tower.weights_sha256
        and train.layers == val.layers
        and (train.views.frames, train.views.sampling, train.views.stride)
        == (val.views.frames, val.views.sampling, val.views.stride)
        and (train.tokens, train.maps, train.classes) == (val.tokens, val.maps, val.classes)
    )


def find_training_caches(
    dataset: str | None,
    cache: Path | None,
    val_cache: Path | None,
    *,
    head: str,
    head_layers: tuple[int, ...] | None,
    needs_maps: bool,
    same_cache_for_val: bool,
    trust: bool = False,
) -> tuple[FeatureCache, FeatureCache]:
    """The training and the validation cache: those named, or the pair there is that fits the head.

    Args:
        same_cache_for_val: clips for validation are named: they may be of the training cache.
        trust: do not check chunks against their marks.

    Raises: UsageError where the arguments do not tell, nothing fits, or several do.
    """
    if dataset is not None and cache is not None:
        raise UsageError("--dataset (caches are found) and --cache; expected one of them at most")
    if cache is not None:
        if val_cache is None and not same_cache_for_val:
            raise UsageError(
                f"--cache {cache} without --val-cache; give one, or --val-clips of the same cache"
            )
        train = FeatureCache(cache, trust=trust)
        return train, train if val_cache is None else FeatureCache(val_cache, trust=trust)

    def fits(spec: CacheSpec) -> bool:
        try:
            wanted = resolve_layers(head, spec.layers, head_layers)
        except UsageError:
            return False
        return bool(wanted) and (spec.has_maps or spec.views.frames == 1 or not needs_maps)

    train_path, val_path = find_pair(dataset, root=cache_root(), fits=fits)
    return FeatureCache(train_path, trust=trust), FeatureCache(val_cache or val_path, trust=trust)


def split_clips(
    train: Source,
    val: Source,
    *,
    train_names: Sequence[str] | None,
    val_names: Sequence[str] | None,
) -> tuple[list[int] | None, list[int] | None]:
    """Rows of the clips to train and to validate on; None is all of them.

    Where both caches hold the same clips (one cache twice, or other views of it), what one side names is left
    out of the other.

    Raises: UsageError for a name that is no clip's, or one that is on both sides.
    """
    train_rows = None if train_names is None else select(train.clips, train_names, source="--train-clips")
    val_rows = None if val_names is None else select(val.clips, val_names, source="--val-clips")
    if train.spec.content_id != val.spec.content_id:
        return train_rows, val_rows
    rows = range(len(train.clips))
    if train_rows is None and val_rows is not None:
        train_rows = sorted(set(rows) - set(val_rows))
    elif val_rows is None and train_rows is not None:
        val_rows = sorted(set(rows) - set(train_rows))
    elif train_rows is not None and val_rows is not None:
        both = [train.clips[row].id for row in sorted(set(train_rows) & set(val_rows))]
        if both:
            raise UsageError(
                f"{both[0]!r} and {len(both) - 1} more are in --train-clips and in --val-clips; keep them apart"
            )
    return train_rows, val_rows


def next_run_directory(cache_name: str, head: str) -> Path:
    """A run directory that does not exist yet: `runs/<cache>-<head>-<number>`."""
    number = 1
    while (path := Path("runs") / f"{cache_name}-{head}-{number}").exists():
        number += 1
    return path
