"""What makes two runs comparable: features, both caches' content, the clips of both sides, head, and options.

Runs that are equal in all of it and differ in their seed are seeds of one training, which may be averaged. All others are
rows of their own.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from evl_cache.canonical_json import digest, flatten, json_text
from evl_cache.errors import CacheError
from evl_cache.heads import MODULES
from evl_cache.runs.directory import RunConfig
from evl_cache.spec import CacheSpec

# Options that change where and how fast a run is trained, not to what: a continuation may have others.
OPERATIONAL = frozenset(
    {"device", "save_every_steps", "keep_in", "keep_bytes", "read_threads", "tensorboard", "cuda_graph"}
)
SEEDS = ("seed", "order_seed")
ALL_CLIPS = "all"  # of a cache, in `config.json`
ONLINE_PREFIX = "online-"  # of the fingerprint of videos in the place of a cache

_SIDES = ("train", "val")
# Options that the head's own arguments or its layers tell, with what they came to.
_TOLD_BY_HEAD = {"head", "head_layers", "num_heads", "dropout", *MODULES}
# What differs between features, for people; the names of towers and of weights are only names.
_NO_FEATURES = {
    "dataset", "split", "classes", "layers", "num_clips", "content_id", "block_clips", "codec", "feature_id",
    "chunk_keys", "tower.model", "tower.pretrained",
}  # fmt: skip
_TOLD_BY_OTHERS = {"num_layers", "num_frames", "num_classes", "width", "grid"}  # layers, classes, features
_SHOWN_DIGITS = 8
_DIGESTED_AT_A_TIME = 100_000
Fact = tuple[Any, str]  # what is compared, and how a person reads it


def comparable_key(config: RunConfig) -> str:
    """Return a digest that is equal for runs that differ in their seed alone."""
    return digest(_identity(config))


def is_same_training(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs are one training done twice: comparable, and of equal seeds."""
    return comparable_key(one) == comparable_key(other) and _seeds(one) == _seeds(other)


class Scored(TypedDict):
    """What was scored: rows of samples of the cache with this fingerprint."""

    fingerprint: str
    samples: np.ndarray


def scored_key(config: RunConfig, *, fingerprint: str, samples: np.ndarray) -> str:
    """Return `comparable_key` of a run as if it had been validated on these samples of this cache."""
    return digest({**_identity(config), **_side("val", _scored(fingerprint, samples))})


def clips_of_run(config: RunConfig, *, fingerprint: str, samples: np.ndarray) -> str:
    """Return whose samples these are: those of the run's `validation`, of its `training`, or `other` ones.

    Args:
        fingerprint: of their cache.
        samples: rows with features, in any order.
    """
    found = _side("", _scored(fingerprint, samples))
    for side, name in (("val", "validation"), ("train", "training")):
        if _side("", config.caches.get(side, {})) == found:
            return name
    return "other"


def samples_digest(samples: np.ndarray) -> str:
    """Return a digest of rows of samples, in any order: `digest` of the sorted list, which may have millions of numbers."""
    rows, found = np.sort(samples), hashlib.sha256(b"[")
    for start in range(0, len(rows), _DIGESTED_AT_A_TIME):
        part = ",".join(map(str, rows[start : start + _DIGESTED_AT_A_TIME].tolist()))
        found.update((f",{part}" if start else part).encode())
    found.update(b"]")
    return found.hexdigest()


def other_sides(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what of a run's data is not what it was: `train cache`, `val clips`, ….

    Args:
        recorded: `caches` of its `config.json`.
        now: the same, as far as it says.
    """
    return [
        f"{side} {what}"
        for side in _SIDES
        for what, name in (("cache", "fingerprint"), ("clips", "samples_sha256"))
        if now[side][name] != recorded.get(side, {}).get(name)
    ]


def is_online(config: RunConfig) -> bool:
    """Whether a run was trained from videos, without a cache."""
    return any(str(side.get("fingerprint", "")).startswith(ONLINE_PREFIX) for side in config.caches.values())


def comparable_rows(configs: Sequence[RunConfig]) -> list[list[int]]:
    """Return the runs of each row of a table, by their places, in the order of each row's first run.

    A row's runs are comparable, and each has another seed: a run that was done again is no further seed.
    """
    rows: dict[tuple[str, int], list[int]] = {}
    times_seen: dict[tuple[str, str], int] = {}
    for place, config in enumerate(configs):
        key = comparable_key(config)
        seed = (key, _seeds(config))
        time = times_seen[seed] = times_seen.get(seed, -1) + 1
        rows.setdefault((key, time), []).append(place)
    return list(rows.values())


def differences(configs: Sequence[RunConfig]) -> list[str]:
    """Return what tells each of several runs apart from the others, such as `weights 1212abcd, lr 0.001`.

    It is empty for runs that differ in nothing that makes a run another one.
    """
    features, data, options = (_differing([facts(config) for config in configs]) for facts in _FACTS)
    if any(features):  # which says why the caches are others
        data = [{name: text for name, text in told.items() if not name.endswith("cache")} for told in data]
    return [
        ", ".join(f"{name} {text}" for told in place for name, text in told.items())
        for place in zip(features, data, options, strict=True)
    ]


def distinct_names(
    names: Sequence[str], told: Sequence[str], *, otherwise: Callable[[int], str]
) -> list[str]:
    """Return names that differ: those that are used twice are told apart by `told`, or by `otherwise` of their place."""
    out = list(names)
    for place, name in enumerate(names):
        if names.count(name) > 1 and told[place]:
            out[place] = f"{name} ({told[place]})"
    return [f"{name} ({otherwise(place)})" if out.count(name) > 1 else name for place, name in enumerate(out)]


def _seeds(config: RunConfig) -> str:
    """The seeds of a run; the order's own, unless another is named, is that of the rest."""
    seed, order_seed = (config.training.get(name) for name in SEEDS)
    return json_text([seed, seed if order_seed is None else order_seed])


def _identity(config: RunConfig) -> dict[str, Any]:
    return {
        "features": _feature_id(config),
        "classes": list(config.classes),
        **{
            name: value for side in _SIDES for name, value in _side(side, config.caches.get(side, {})).items()
        },
        **_options(config),
    }


def _feature_id(config: RunConfig) -> str | None:
    if config.features is None:
        return None
    spec = _spec(config)
    return digest(dict(config.features)) if spec is None else spec.feature_id


def _spec(config: RunConfig) -> CacheSpec | None:
    """Return the spec of a run's features; None where there is none, or a stranger's is not one."""
    try:
        return None if config.features is None else CacheSpec.from_json(config.features)
    except CacheError:
        return None


def _side(side: str, cache: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a cache, and the samples of it; early runs did not record which, only how many."""
    clips = cache.get("samples_sha256") or cache.get("samples")
    return {f"{side} cache": cache.get("fingerprint"), f"{side} clips": clips}


def _scored(fingerprint: str, samples: np.ndarray) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "samples_sha256": samples_digest(samples)}


def _options(config: RunConfig) -> dict[str, Any]:
    """What is trained and how, without what changes no result; as JSON has it."""
    left = {
        name: value
        for name, value in config.training.items()
        if name not in OPERATIONAL | _TOLD_BY_HEAD and name not in SEEDS
    }
    head = {"head": config.head, "layers": config.layers, **config.head_config}
    content: dict[str, Any] = json.loads(json_text({**head, **left}))
    return content


def _facts_of_features(config: RunConfig) -> dict[str, Fact]:
    spec = _spec(config)
    if spec is None:
        return {"features": _fact(_feature_id(config))}
    facts = {name: value for name, value in flatten(spec.to_json()).items() if name not in _NO_FEATURES}
    weights = facts.pop("tower.weights_sha256")
    return {
        "weights": (weights, f"{spec.tower.model} {weights[:_SHOWN_DIGITS]}"),
        **{name.rpartition(".")[2]: _fact(value) for name, value in facts.items()},
    }


def _facts_of_data(config: RunConfig) -> dict[str, Fact]:
    names = list(config.classes)
    facts: dict[str, Fact] = {"classes": (names, f"{len(names)} ({digest(names)[:_SHOWN_DIGITS]})")}
    for side in _SIDES:
        cache = config.caches.get(side, {})
        name = str(cache.get("path", "")).rstrip("/").rpartition("/")[2]
        for (what, value), shown in zip(
            _side(side, cache).items(), (name, f"{cache.get('samples')} samples"), strict=True
        ):
            facts[what] = (value, f"{shown} ({str(value)[:_SHOWN_DIGITS]})")
    return facts


def _facts_of_training(config: RunConfig) -> dict[str, Fact]:
    return {name: _fact(value) for name, value in _options(config).items() if name not in _TOLD_BY_OTHERS}


_FACTS = (_facts_of_features, _facts_of_data, _facts_of_training)


def _fact(value: Any) -> Fact:
    if isinstance(value, list):
        return value, ",".join(map(str, value))
    return value, "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _differing(facts: Sequence[Mapping[str, Fact]]) -> list[dict[str, str]]:
    """Return the texts of those facts, by name, that are not the same for all; a fact may be missing."""
    absent: Fact = (None, "not recorded")
    names = [
        name
        for name in dict.fromkeys(name for told in facts for name in told)
        if any(told.get(name, absent)[0] != facts[0].get(name, absent)[0] for told in facts)
    ]
    return [{name: told.get(name, absent)[1] for name in names} for told in facts]
