"""Finding caches by what they hold, where a command does not name one."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from evl_cache.caches.extract_command import extract_command, is_undivided, run_command
from evl_cache.caches.places import CACHE_ROOT_VARIABLE, FoundCache, cache_places, find_caches
from evl_cache.clips import TRAIN_SPLITS, VAL_SPLITS
from evl_cache.errors import UsageError
from evl_cache.extract_options import DEFAULT_MODEL, DEFAULT_MODEL_LAYERS
from evl_cache.notation import command_line, format_layers, parse_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache, is_url, open_objects, public_url, read_clips, read_description
from evl_cache.train import HeadNeeds, pair_differences


def find_pair(
    dataset: str | None, *, places: Sequence[str | Path], needs: HeadNeeds
) -> tuple[FoundCache, FoundCache]:
    """The one training cache (of a data set, where named) that fits, and its validation cache.

    Raises: UsageError where none fits, saying what is missing and how to make it, or several do (they are listed).
    """
    found = [c for place in places for c in find_caches(place) if dataset in (None, c.spec.dataset)]
    wanted = "caches" if dataset is None else f"caches of {dataset}"
    under = ", ".join(public_url(str(p)) if is_url(p) else str(p) for p in places)
    if not found:
        layers = range(1, DEFAULT_MODEL_LAYERS + 1)
        words = ("--dataset", dataset or "NAME", "--layers", needs.layers(DEFAULT_MODEL_LAYERS))
        remedy = _no_command(DEFAULT_MODEL, needs.lacking(layers)) or run_command(
            command_line(("evl-cache", "extract", *words))
        )
        raise UsageError(f"no {wanted} under {under}; {remedy}, or set {CACHE_ROOT_VARIABLE}")
    clip_ids = lru_cache(maxsize=None)(_clip_ids)
    pairs = [
        (t, v)
        for t in found
        if t.spec.split in TRAIN_SPLITS and needs.objection(t.spec) is None
        for v in found
        if v.spec.split in VAL_SPLITS
        and _belong_together(t.spec, v.spec)
        and t.spec.content_id != v.spec.content_id
        # Folds of one data set: what one trains on, another validates on.
        and clip_ids(t.address).isdisjoint(clip_ids(v.address))
    ]
    if pairs:  # of one rule for frames if there are any, and of the newest
        best = max(map(_by_rules, pairs))
        pairs = [pair for pair in pairs if _by_rules(pair) == best]
    if len(pairs) == 1:
        return pairs[0]
    listed = "; ".join(
        f"{c.name} ({c.spec.dataset} {c.spec.split}, {c.spec.tower.model}, layers {list(c.spec.layers)})"
        for c in found
    )
    if not pairs:
        raise UsageError(
            f"no pair of train and validation {wanted} under {under} fits the head; there are: {listed}; "
            f"{_missing(found, needs)}"
        )
    raise UsageError(f"several {wanted} under {under} fit; name one with --cache and --val-cache: {listed}")


def _by_rules(pair: tuple[FoundCache, FoundCache]) -> tuple[bool, int]:
    rules = {cache.spec.frame_rule for cache in pair}
    return len(rules) == 1, min(rules)


def _missing(found: Sequence[FoundCache], needs: HeadNeeds) -> str:
    """Return what the caches that come nearest lack, and how to make it."""
    train = [c for c in found if c.spec.split in TRAIN_SPLITS]
    fitting = [c for c in train if needs.objection(c.spec) is None]
    if fitting:
        nearest = fitting[0]
        same = [
            c
            for c in found
            if c.spec.split in VAL_SPLITS
            and _belong_together(nearest.spec, c.spec)
            and c.spec.content_id == nearest.spec.content_id
        ]
        if not same:
            return f"{nearest.name} fits, but its validation cache is missing; {_other_side(nearest, 'val')}"
        whole = replace(nearest, origin={**nearest.origin, "is_undivided": True})
        return (
            f"{nearest.name} fits, but {same[0].name} has the same clips, by their names (of other videos, name both: "
            f"--cache, --val-cache); {_other_side(whole, 'val')}"
        )
    if not train:
        return f"the training cache is missing; {_other_side(found[0], 'train')}"
    nearest, spec = train[-1], train[-1].spec
    layers = needs.layers(spec.tower.blocks)
    maps = "uint8" if needs.some_maps and spec.maps == "none" else spec.maps
    remedy = _no_command(spec.tower.model, needs.lacking(range(1, spec.tower.blocks + 1)))
    if remedy is None:
        try:
            replace(spec, layers=parse_layers(layers), maps=maps)
            command = extract_command(nearest, split=None, layers=layers, maps=maps, environ=os.environ)
            remedy = run_command(command)
        except UsageError as error:  # no cache is of those layers and maps together
            remedy = str(error)
    return f"{nearest.name}: {needs.objection(spec)}; {remedy}"


def _no_command(model: str, lacking: str | None) -> str | None:
    """Return what to do where heads read what not even all layers of a model are; None where they are."""
    if lacking is None:
        return None
    return f"not even all layers of {model} would do ({lacking}): choose another head, or extract with another --model"


def _other_side(found: FoundCache, split: str) -> str:
    """Return how to make the cache of another split, or to do without it."""
    command = extract_command(found, split=split, layers=format_layers(found.spec.layers), environ=os.environ)
    if not is_undivided(found):
        return run_command(command)
    return (
        f"hold clips of it out (--cache {found.place} --val-clips FILE), or for others {run_command(command)}"
    )


def _clip_ids(address: str) -> frozenset[str]:
    objects = open_objects(address)
    return frozenset(read_clips(objects, read_description(objects)).ids())


def _belong_together(train: CacheSpec, val: CacheSpec) -> bool:
    """Whether `train` takes them as a pair and they are stored alike.

    It takes caches that are stored otherwise too, but those a person has to name: else several pairs would often fit.
    """
    stored = ((s.dataset, s.layers, s.tokens, s.maps) for s in (train, val))
    return len(set(stored)) == 1 and not pair_differences(train, val)


def find_training_caches(
    dataset: str | None,
    cache: Path | str | None,
    val_cache: Path | str | None,
    *,
    needs: HeadNeeds,
    same_cache_for_val: bool,
    trust: bool = False,
    on_found: Callable[[FeatureCache, FeatureCache], None] = lambda train, val: None,
) -> tuple[FeatureCache, FeatureCache]:
    """The training and the validation cache: those named, or the pair there is that fits.

    Args:
        needs: of the heads to train.
        same_cache_for_val: clips for validation are named: they may be of the training cache.
        trust: do not check chunks against their marks.
        on_found: told the pair, where none was named.

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

    pair = find_pair(dataset, places=cache_places(), needs=needs)
    opened = (
        FeatureCache(pair[0].address, trust=trust),
        FeatureCache(val_cache or pair[1].address, trust=trust),
    )
    on_found(*opened)
    return opened
