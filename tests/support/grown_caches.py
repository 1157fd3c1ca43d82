"""Caches of `make_clips` that grow, and the same made at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from evl_cache.clips import ClipList
from evl_cache.extract.grown import extract_grown
from evl_cache.extract.growth import Growth, plan_growth
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.stage import ExtractResult
from evl_cache.spec import ViewSpec
from tests.support.store_helpers import extract_small, one_thread, small_job, small_spec, small_tower

AUGMENTED = ViewSpec(frames=4, stride=2, train_views=2, augment_seed=3, flip=True)


def first_clips(clips: ClipList, count: int) -> ClipList:
    """The first so many of a list."""
    return replace(clips, clips=clips.clips[:count])


def spec_of(clips: ClipList, **changes: Any) -> Any:
    """The spec of a small cache of these clips."""
    return small_spec(clips, small_tower(Path(clips.source)), **changes)


def planned(clips: ClipList, cache: Path, **changes: Any) -> Growth | None:
    """How a cache grows into what a spec with these changes holds."""
    return plan_growth(small_job(clips, cache, spec=spec_of(clips, **changes)))


def grow(
    clips: ClipList, cache: Path, *, options: dict[str, Any] | None = None, **changes: Any
) -> ExtractResult:
    """Make a cache, or let it grow into what a spec with these changes holds, as the command does."""
    growth = planned(clips, cache, **changes)
    if growth is None:
        return extract_small(clips, cache, spec=spec_of(clips, **changes), **(options or {}))
    with one_thread():
        return extract_grown(growth, options=ExtractOptions(batch=4, decode_workers=1, **(options or {})))
