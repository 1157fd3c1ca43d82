"""A run done again: its options and data as its `config.json` records them, and what is not as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from evl_cache.batches import split_clips
from evl_cache.canonical_json import flatten
from evl_cache.errors import UsageError
from evl_cache.runs import (
    RunConfig,
    RunFile,
    is_online,
    is_same_training,
    read_run_config,
    recorded_cache,
    recorded_clips,
)
from evl_cache.store import FeatureCache, file_digest
from evl_cache.train.options import TrainOptions

_CHANGES_NO_RESULT = {"command", "date"}


def check_again(run: Path, config: RunConfig) -> None:
    """Check that a run can be done again from its `config.json`. Raises: UsageError that says what to do instead."""
    if config.features is None:
        raise UsageError(f"{run}: its head was imported, not trained; train one with --cache, or --dataset")
    if is_online(config):
        command = (config.environment or {}).get("command")
        raise UsageError(
            f"{run}: it was trained from videos, which --again does not do; give its options again"
            + (f": {command}" if command else "")
        )


def options_again(run: Path, config: RunConfig, given: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a run, but for those given.

    Raises: UsageError for options that contradict each other, or a run of a version that has others.
    """
    known = {field.name for field in fields(TrainOptions)}
    if unknown := sorted(config.training.keys() - known):
        raise UsageError(
            f"{run}: has options that this evl-cache does not know ({', '.join(unknown)[:80]}); use the version that wrote it"
        )
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.training.items()
    }
    if "epochs" in given or "steps" in given:
        values |= {"epochs": None, "steps": None}
    if "head" in given:
        values["head_layers"] = None
    try:
        return TrainOptions(**{**values, **given})
    except TypeError as error:
        raise UsageError(f"{run}: its options are none that train has ({error})") from error


def data_again(
    run: Path,
    config: RunConfig,
    *,
    cache: Path | None = None,
    val_cache: Path | None = None,
    train_names: Sequence[str] | None = None,
    val_names: Sequence[str] | None = None,
    trust: bool = False,
) -> tuple[FeatureCache, FeatureCache, list[int] | None, list[int] | None]:
    """Return the caches of a run and the rows of its clips of each, but for what is named; None is all clips.

    Args:
        cache, val_cache: others than the run's.
        train_names, val_names: ids or paths of other clips; where one side is named, the other is what `split_clips` gives.

    Raises: UsageError where a cache is not what it was; as `recorded_cache`, `recorded_clips` and `split_clips`.
    """
    train, val = (
        _as_recorded(run, config, side, option=option, trust=trust)
        if named is None
        else FeatureCache(named, trust=trust)
        for side, option, named in (("train", "--cache", cache), ("val", "--val-cache", val_cache))
    )
    if train_names is not None or val_names is not None:
        return train, val, *split_clips(train, val, train_names=train_names, val_names=val_names)
    rows = (recorded_clips(run, config, side, found) for side, found in (("train", train), ("val", val)))
    return train, val, next(rows), next(rows)


def _as_recorded(run: Path, config: RunConfig, side: str, *, option: str, trust: bool) -> FeatureCache:
    """Open a cache of a run. Raises: UsageError where it holds something else by now; as `recorded_cache`."""
    cache = recorded_cache(run, config, side, option=option, trust=trust)
    recorded = str(config.caches[side].get("fingerprint"))
    if cache.fingerprint != recorded:
        raise UsageError(
            f"{cache.place}: is not what {run} was trained with any more (digest {cache.fingerprint[:12]}, not "
            f"{recorded[:12]}); name it with {option} to take it all the same"
        )
    return cache


def has_the_same_head(run: Path, out: Path) -> bool | None:
    """Whether a run that was done again ended with the same head, bit for bit; None where it was done with other options."""
    if not is_same_training(read_run_config(run), read_run_config(out)):
        return None
    files = (run / RunFile.HEAD, out / RunFile.HEAD)
    return all(file.is_file() for file in files) and file_digest(files[0]) == file_digest(files[1])


def not_as_it_was(config: RunConfig, now: Mapping[str, Any]) -> list[str]:
    """Return what of a run's environment is not what it was, such as `threads 2, now 1`; nothing where it recorded none."""
    if config.environment is None:
        return []
    before, after = (flatten(part) for part in (config.environment, now))
    return [
        f"{name.rpartition('.')[2]} {before[name]}, now {value}"
        for name, value in after.items()
        if name in before and before[name] != value and name not in _CHANGES_NO_RESULT
    ]
