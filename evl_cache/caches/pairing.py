"""Finding caches by what they hold, where a command does not name one."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from evl_cache.caches.extract_command import extract_command, is_undivided, run_command
from evl_cache.caches.places import (
    CACHE_ROOT_VARIABLE,
    FoundCache,
    NotSeen,
    cache_places,
    find_caches,
    look_at_places,
)
from evl_cache.clips import TRAIN_SPLITS, VAL_SPLITS
from evl_cache.errors import EvlCacheError, UsageError, WaitEnded
from evl_cache.extract_options import DEFAULT_MODEL, DEFAULT_MODEL_LAYERS
from evl_cache.notation import command_line, format_layers, parse_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache, cache_parts, is_url, public_text, public_url
from evl_cache.train import HeadNeeds, pair_differences

_MOST_TOLD = 4  # of what could not be looked at, in an error
OnNotSeen = Callable[[Sequence[NotSeen]], None]


def find_pair(
    dataset: str | None,
    *,
    places: Sequence[str | Path] | None,
    needs: HeadNeeds,
    on_not_seen: OnNotSeen = lambda not_seen: None,
) -> tuple[FoundCache, FoundCache]:
    """The one training cache (of a data set, where named) that fits, and its validation cache, among what can be seen.

    Args:
        places: None for those of `$EVL_CACHE_ROOT`.
        on_not_seen: told what could not be looked at, if anything, where a pair was found all the same.

    Raises: UsageError where none fits, saying what could not be looked at, what is missing and how to make it, or
        several do (they are listed).
    """
    seen = list(look_at_places(places, find_caches))
    not_seen = [one for one in seen if isinstance(one, NotSeen)]
    found = [one for one in seen if isinstance(one, FoundCache) and dataset in (None, one.spec.dataset)]
    pairs = _fitting(found, needs, not_seen)
    if len(pairs) == 1:
        if not_seen:
            on_not_seen(not_seen)
        return pairs[0]
    wanted = "caches" if dataset is None else f"caches of {dataset}"
    shown = (public_url(str(p)) if is_url(p) else str(p) for p in places or cache_places())
    under = f"{wanted} under {', '.join(shown)}"
    if not found:
        remedy = f"{_made_anew(dataset, needs)}, or set {CACHE_ROOT_VARIABLE}"
        raise UsageError(f"{_unknown(not_seen)}no {under}; {remedy}")
    listed = "; ".join(
        f"{c.name} ({c.spec.dataset} {c.spec.split}, {c.spec.tower.model}, layers {list(c.spec.layers)})"
        for c in found
    )
    if not pairs:
        raise UsageError(
            f"{_unknown(not_seen)}no pair of train and validation {under} fits the head; there are: {listed}; "
            f"{_missing(found, needs)}"
        )
    raise UsageError(f"several {under} fit; name one with --cache and --val-cache: {listed}")


def _fitting(
    found: Sequence[FoundCache], needs: HeadNeeds, not_seen: list[NotSeen]
) -> list[tuple[FoundCache, FoundCache]]:
    """Return the pairs that fit: of the same classes and of one rule for frames if there are any, and of the newest.

    Args:
        not_seen: gets those whose clips cannot be read: they are in no pair.
    """
    clips = _Clips(not_seen)
    pairs = [
        (t, v)
        for t in found
        if t.spec.split in TRAIN_SPLITS and needs.objection(t.spec) is None
        for v in found
        if v.spec.split in VAL_SPLITS
        and _belong_together(t.spec, v.spec)
        and t.spec.content_id != v.spec.content_id
        # Folds of one data set: what one trains on, another validates on.
        and clips.are_apart(t, v)
    ]
    best = max(map(_rank, pairs), default=None)
    return [pair for pair in pairs if _rank(pair) == best]


class _Clips:
    """The ids of the clips of caches, read once each. `not_seen`: gets the caches whose clips cannot be read."""

    def __init__(self, not_seen: list[NotSeen]) -> None:
        self._not_seen = not_seen
        self._ids: dict[str, frozenset[str] | None] = {}

    def are_apart(self, one: FoundCache, other: FoundCache) -> bool:
        """Whether both lists of clips can be read, and no clip is in both."""
        ids, others = self._of(one), self._of(other)
        return ids is not None and others is not None and ids.isdisjoint(others)

    def _of(self, cache: FoundCache) -> frozenset[str] | None:
        if cache.address not in self._ids:
            try:
                found = frozenset(clip.id for clip in cache_parts(cache.address).clips())
            except WaitEnded:
                raise
            except (EvlCacheError, OSError) as error:
                self._not_seen.append(NotSeen.of(cache.address, error))
                self._ids[cache.address] = None
            else:
                self._ids[cache.address] = found
        return self._ids[cache.address]


def _unknown(not_seen: Sequence[NotSeen]) -> str:
    """Return the beginning of an error: what could not be looked at, and so may fit."""
    if not not_seen:
        return ""
    told = [f"{one.place} ({one.reason})" for one in not_seen[:_MOST_TOLD]]
    more = f" and {len(not_seen) - _MOST_TOLD} more" if len(not_seen) > _MOST_TOLD else ""
    return (
        f"could not look at {', nor at '.join(told)}{more}: what fits may be there; of what could be seen: "
    )


def _made_anew(dataset: str | None, needs: HeadNeeds) -> str:
    """Return how to make a cache where there is none like it."""
    layers = range(1, DEFAULT_MODEL_LAYERS + 1)
    words = ("--dataset", dataset or "NAME", "--layers", needs.layers(DEFAULT_MODEL_LAYERS))
    return _no_command(DEFAULT_MODEL, needs.lacking(layers)) or run_command(
        command_line(("evl-cache", "extract", *words))
    )


def _rank(pair: tuple[FoundCache, FoundCache]) -> tuple[bool, bool, int]:
    rules = {cache.spec.frame_rule for cache in pair}
    # Of several lists of one data set each goes with that of its own classes.
    return pair[0].spec.classes == pair[1].spec.classes, len(rules) == 1, min(rules)


def _missing(found: Sequence[FoundCache], needs: HeadNeeds) -> str:
    """Return what the caches that come nearest lack, and how to make it."""
    train = [c for c in found if c.spec.split in TRAIN_SPLITS]
    fitting = [c for c in train if needs.objection(c.spec) is None]
    if fitting:
        nearest = fitting[0]
        same = [c for c in found if c.spec.split in VAL_SPLITS and _belong_together(nearest.spec, c.spec)]
        if not same and (others := _of_other_classes(nearest, found)) is not None:
            return f"{nearest.name} fits, but its validation cache is missing: {others}"
        if not same:
            return f"{nearest.name} fits, but its validation cache is missing; {_other_side(nearest, 'val')}"
        whole = replace(nearest, origin={**nearest.origin, "is_undivided": True})
        clips = (
            "the same clips" if same[0].spec.content_id == nearest.spec.content_id else "some of its clips"
        )
        return (
            f"{nearest.name} fits, but {same[0].name} has {clips}, by their names (of other videos, name both: "
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


def _of_other_classes(train: FoundCache, found: Sequence[FoundCache]) -> str | None:
    """Return why a validation cache is not that of a training cache where only its classes do not fit; None if none is."""
    for cache in found:
        alike = replace(cache.spec, classes=train.spec.classes)
        differing = pair_differences(train.spec, cache.spec)
        if cache.spec.split in VAL_SPLITS and differing and _belong_together(train.spec, alike):
            return f"{cache.name} is like it, but for {'; '.join(differing)}"
    return None


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
    on_not_seen: OnNotSeen = lambda not_seen: None,
) -> tuple[FeatureCache, FeatureCache]:
    """The training and the validation cache: those named, or the pair there is that fits.

    Args:
        needs: of the heads to train.
        same_cache_for_val: clips for validation are named: they may be of the training cache.
        trust: do not check chunks against their marks.
        on_found: told the pair, where none was named.
        on_not_seen: told what could not be looked at, where a pair was found all the same.

    Raises: UsageError where the arguments do not tell, nothing fits, or several do.
    """
    if dataset is not None and cache is not None:
        raise UsageError("--dataset (caches are found) and --cache; expected one of them at most")
    if cache is not None:
        if val_cache is None and not same_cache_for_val:
            raise UsageError(
                f"--cache {public_text(str(cache))} without --val-cache; give one, or --val-clips of the same cache"
            )
        train = FeatureCache(cache, trust=trust)
        return train, train if val_cache is None else FeatureCache(val_cache, trust=trust)

    pair = find_pair(dataset, places=None, needs=needs, on_not_seen=on_not_seen)
    opened = (
        FeatureCache(pair[0].address, trust=trust),
        FeatureCache(val_cache or pair[1].address, trust=trust),
    )
    on_found(*opened)
    return opened
