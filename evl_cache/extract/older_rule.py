"""Caches whose frames an older rule chose, where one of the same clips and features is asked for.

Such a cache keeps its identity, and what is extracted into it now is by the rule of today: its marks say so.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

from evl_cache.caches.places import cache_places
from evl_cache.clips import TRAIN_SPLITS, VAL_SPLITS
from evl_cache.errors import CacheError
from evl_cache.extract.doubts import has_older_frames
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.notation import command_line
from evl_cache.spec import FRAME_RULE, CacheSpec
from evl_cache.store import is_url, marked_blocks, read_description


def spec_there(spec: CacheSpec, cache_path: Path) -> CacheSpec:
    """Return the spec of the cache at a path where only the rule of its frames or its files' names differ; else `spec`."""
    theirs = _read_spec(cache_path)
    if theirs is None:
        return spec
    as_theirs = replace(spec, frame_rule=theirs.frame_rule, chunk_keys=theirs.chunk_keys)
    return spec if as_theirs.differences(theirs) else as_theirs


def job_to_redo(job: ExtractionJob, options: ExtractOptions) -> ExtractionJob:
    """Return the job on the older cache of the same, where clips that are done are to be made again and only that has any.

    What is doubtful is in the older one only, so for that it goes before a newer one.
    """
    if not (options.retry_doubtful or options.retry_failed or options.check_sources):
        return job
    is_begun = bool(marked_blocks(job.cache_path))
    older = (
        None if is_begun and not options.retry_doubtful else _older_cache(job.spec, [job.cache_path.parent])
    )
    if older is None:
        return job
    return replace(job, cache_path=older, spec=spec_there(job.spec, older))


def told_of_rule(job: ExtractionJob, options: ExtractOptions) -> str | None:
    """What a user is told of the rule of frames before a cache is extracted; None where it is today's, and no other there."""
    if job.spec.by_older_rule:
        if not has_older_frames(job.cache_path, job.spec):
            return None
        more = "" if options.retry_doubtful else "; --retry-doubtful makes again what may be of other frames"
        return (
            f"{job.cache_path} was made when rule {job.spec.frame_rule} chose frames: it stays that cache, and what is "
            f"extracted now is by rule {FRAME_RULE} and marked so{more}"
        )
    if options.reuse is not None or marked_blocks(job.cache_path):
        return None
    places = [Path(place) for place in cache_places() if not is_url(place)]
    older = _older_cache(job.spec, [job.cache_path.parent, *places])
    if older is None:
        return None
    split = ("--split", job.spec.split) if job.spec.split in (*TRAIN_SPLITS, *VAL_SPLITS) else ()
    shown = command_line((*split, "--reuse", str(older))) or "--reuse"
    return (
        f"{older} has the same clips by an older rule for frames: {shown} copies those that are not doubtful"
    )


def _older_cache(spec: CacheSpec, places: list[Path]) -> Path | None:
    """Return where a cache of the same clips and features by an older rule lies under its usual name, if anywhere."""
    for rule in range(FRAME_RULE - 1, 0, -1):
        wanted = replace(spec, frame_rule=rule)
        for path in (place / wanted.name for place in places):
            theirs = _read_spec(path)
            if theirs is not None and not replace(wanted, chunk_keys=theirs.chunk_keys).differences(theirs):
                return path
    return None


def _read_spec(cache_path: Path) -> CacheSpec | None:
    with contextlib.suppress(CacheError):  # what cannot be read is told where it is used
        return read_description(cache_path).spec
    return None
