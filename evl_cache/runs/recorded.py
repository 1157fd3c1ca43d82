"""What a run's `config.json` records of its data, opened again."""

import os
from collections.abc import Sequence
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheError, UsageError, WaitEnded
from evl_cache.notation import parse_rows
from evl_cache.runs.comparable import ALL_CLIPS, is_online
from evl_cache.runs.directory import RunConfig
from evl_cache.store import FeatureCache, is_url


def recorded_cache(
    run: Path, config: RunConfig, side: str, *, option: str = "--cache", trust: bool = False
) -> FeatureCache:
    """Open a cache that a run names, a directory or a URL.

    Args:
        side: `train` or `val`.
        option: that names another one, for errors.
        trust: do not check chunks against their marks.

    Raises: UsageError where the run names none; CacheError where there is none, or it cannot be read.
    """
    place = str(config.caches.get(side, {}).get("path", ""))
    if not place or is_online(config):
        how = "was trained from videos (--online)" if place else "was imported"
        raise UsageError(f"{run}: it {how}, so it names no cache; give {option}")
    which = f"{run}: its {'validation' if side == 'val' else 'training'} cache"
    if not is_url(place) and not (Path(place) / "zarr.json").is_file():
        raise CacheError(f"{which} {place} is not there; give {option}")
    try:
        return FeatureCache(place, trust=trust)
    except WaitEnded:
        raise
    except CacheError as error:  # a run does not keep a URL's password
        raise CacheError(f"{which} cannot be opened ({error}); give {option}") from error


def recorded_clips(run: Path, config: RunConfig, side: str, cache: FeatureCache) -> list[int] | None:
    """Return the rows of the clips that a run had of a cache, or of one of the same clips; None for all of them.

    Raises: UsageError where the run does not tell, or the cache has other clips.
    """
    recorded = config.caches.get(side, {})
    clips, option = recorded.get("clips"), f"--{side}-clips"
    if clips == ALL_CLIPS:
        return None
    if not isinstance(clips, str):
        raise UsageError(f"{run}: it does not record its clips; name them with {option}")
    if recorded.get("content_id") != cache.spec.content_id:
        raise UsageError(f"{cache.place}: has other clips than {run} had; name them with {option}")
    try:
        return parse_rows(clips, below=len(cache.clips))
    except ValueError as error:
        raise UsageError(f"{run}: its clips of {side} are not those of {cache.place} ({error})") from error


def count_trained_on(config: RunConfig, cache: FeatureCache, clips: Sequence[int]) -> int | None:
    """Return how many clips of a cache a run was trained on; None where that is not known.

    Of a cache of another list they are told by the names of their files, where the training cache still lies on a disk here.

    Args:
        clips: rows of the cache's list.
    """
    recorded = config.caches.get("train", {})
    if recorded.get("content_id") != cache.spec.content_id:
        trained_on = _names_trained_on(config)
        return (
            None
            if trained_on is None
            else sum(not trained_on.isdisjoint(names_of(cache.clips[row])) for row in clips)
        )
    try:
        trained = recorded_clips(Path(), config, "train", cache)
    except UsageError:
        return None
    return len(clips) if trained is None else len(set(trained).intersection(clips))


def names_of(clip: Clip) -> tuple[str, str]:
    """Return two names, one of which two caches have in common of one clip: its path, and its id with the file's name.

    Ids alone may be numbers that each list gives anew. The part of the video is in both names.
    """
    part = "" if clip.segment is None else f"#{clip.segment} {clip.segment.unit}"
    return f"{os.path.normpath(clip.path)}{part}", f"{clip.id}\0{os.path.basename(clip.path)}{part}"


def _names_trained_on(config: RunConfig) -> frozenset[str] | None:
    """Return the names of the clips that a run was trained on; None where its cache is not there, or no longer what it was."""
    recorded = config.caches.get("train", {})
    place = str(recorded.get("path", ""))
    if not place or is_url(place) or is_online(config) or not (Path(place) / "zarr.json").is_file():
        return None
    try:
        cache = FeatureCache(place)
        rows = recorded_clips(Path(), config, "train", cache)
    except (CacheError, UsageError):
        return None
    wanted = None if rows is None else set(rows)
    return frozenset(
        name
        for row, clip in enumerate(cache.clips)
        if wanted is None or row in wanted
        for name in names_of(clip)
    )
