"""Proof of every byte of a cache and of what was added to it: each of them alone, and that they belong together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evl_cache.clips import ClipList
from evl_cache.errors import CacheDamaged, CacheError, Unreachable, WaitEnded
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.format.description import read_clips, read_description
from evl_cache.store.format.grown import (
    CLIPS,
    GROWN_NAME,
    SECOND_COPY_NAME,
    Grown,
    check_addition,
    check_not_lost,
    find_grown,
    grown_digest,
    grown_spec,
)
from evl_cache.store.format.parts import cache_parts, place_of
from evl_cache.store.verify import Problem, Verification
from evl_cache.store.verify import verify_cache as verify_alone
from evl_cache.store.writing.growth import check_videos


def verify_cache(
    cache_path: Path, *, alone: Callable[..., Verification] = verify_alone, **options: Any
) -> Verification:
    """Check every file of a cache, and of what was added to it.

    Arguments and errors as `verify_alone`, which checks a cache without what was added to it, unless `alone` does.
    """
    base = alone(cache_path, **options)
    if base.blocks == 0:  # without its description nothing more can be looked at
        return base
    try:
        spec = read_description(cache_path).spec
        grown = find_grown(cache_path, spec)
        check_not_lost(cache_path, spec, grown)
    except CacheDamaged as error:
        known = {problem.reason for problem in base.problems}
        more = () if str(error) in known else (Problem(block=None, reason=str(error)),)
        return replace(base, problems=(*base.problems, *more), cache_digest=None)
    if grown is None:
        return base
    found = [base]
    for addition in grown.additions:
        try:
            found.append(alone(Path(place_of(cache_path, addition)), **options))
        except (Unreachable, WaitEnded):
            raise
        except CacheError as error:
            problem = Problem(block=None, reason=str(error))
            found.append(
                replace(base, problems=(problem,), blocks_done=0, blocks=0, strays=(), cache_digest=None)
            )
    places = ["", *(f"{addition.place}/" for addition in grown.additions)]
    together = [] if any(one.problems for one in found) else _check_together(cache_path, grown, found)
    digests = [one.cache_digest for one in found]
    return replace(
        base,
        problems=(
            *base.problems,
            *(replace(problem, block=None) for one in found[1:] for problem in one.problems),
            *(Problem(block=None, reason=reason) for reason in together),
        ),
        blocks_done=sum(one.blocks_done for one in found),
        blocks=sum(one.blocks for one in found),
        strays=tuple(
            f"{place}{name}" for place, one in zip(places, found, strict=True) for name in one.strays
        ),
        sampled_blocks=None if base.sampled_blocks is None else sum(one.sampled_blocks or 0 for one in found),
        cache_digest=None if None in digests or together else grown_digest([one for one in digests if one]),
    )


def _check_together(cache_path: Path, grown: Grown, found: Sequence[Verification]) -> list[str]:
    """Return what is wrong with how the base and its additions, each of which is intact, belong together."""
    where, reasons = cache_path / GROWN_NAME, list[str]()
    named = [(cache_path, grown.cache_digest)]
    named += [(cache_path / addition.place, addition.cache_digest) for addition in grown.additions]
    for (path, then), one in zip(named, found, strict=True):
        if one.cache_digest != then:
            reasons.append(f"{where}: names another digest of {path}; run extract again, or repair the cache")
    description = read_description(cache_path)
    base = whole = description.spec
    clips = list(read_clips(cache_path, description))
    for addition, (side, box) in zip(grown.additions, grown.boxes(base), strict=True):
        path = cache_path / addition.place
        own = read_description(path)
        listed = read_clips(path, own)
        classes = own.spec.classes if side == CLIPS else whole.classes
        whole = grown_spec(base, box, addition, classes=classes)
        if side == CLIPS:
            clips += listed
        try:
            check_addition(own.spec, whole, addition, str(path))
            if [clip.id for clip in listed] != [clips[row].id for row in addition.box.clips]:
                raise CacheDamaged(f"{path}: holds other clips than {cache_path}; repair the cache")
            if ClipList(clips=tuple(clips), classes=(), source="").content_id != addition.content_id:
                raise CacheDamaged(f"{where}: names other clips than are there; repair the cache")
        except CacheError as error:
            reasons.append(str(error))
    try:
        check_videos(cache_parts(cache_path).parts)
    except CacheError as error:
        reasons.append(str(error))
    try:
        if file_digest(cache_path / SECOND_COPY_NAME) != file_digest(where):
            raise CacheDamaged(
                f"{cache_path / SECOND_COPY_NAME}: is not the same as {where}; repair the cache"
            )
    except (OSError, CacheError) as error:
        reasons.append(str(error))
    return reasons
