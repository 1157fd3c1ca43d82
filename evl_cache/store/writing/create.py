"""Creating a cache: its description, clip list and empty arrays, laid down once."""

import contextlib
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evl_cache.attention_maps import MapProjection
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links, is_there, names_in
from evl_cache.store.disk.lock_files import CACHE_LOCK
from evl_cache.store.disk.locks import EXPIRY_S, BlockLock, LockWatcher
from evl_cache.store.disk.publish import AlreadyPublished, write_atomic
from evl_cache.store.format.description import (
    CacheDescription,
    clips_lines,
    description_content,
    group_document,
    read_description,
)
from evl_cache.store.format.layout import (
    DONE_NAME,
    LOCKS_NAME,
    PROJECTIONS_NAME,
    array_layouts,
    marked_blocks,
)
from evl_cache.store.format.limits import check_labels, check_limits
from evl_cache.store.format.occupied import check_place
from evl_cache.store.format.recomputed import projections_content
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.store.writing.leftovers import remove_leftovers

_ATTEMPTS = 5  # by a job whose lock is taken over again and again
_REMEMBERED_S, _LOOK_S = 60.0, 0.1  # Linux's NFS client remembers what is not there for up to a minute


def create_cache(
    cache_path: Path,
    spec: CacheSpec,
    clips: Iterable[Clip],
    *,
    origin: Mapping[str, Any],
    created_with: Mapping[str, str],
    projections: Mapping[int, MapProjection] | None = None,
    lock_expiry_s: float = EXPIRY_S,
) -> None:
    """Lay a cache down, or find the same one there. Several jobs may do so at once.

    Args:
        origin: what the cache is made from, for `repair`.
        created_with: versions of the software.
        projections: projections of the spec's layers, where it recomputes maps.
        lock_expiry_s: how long the lock of a job that stands still is waited for.

    Raises: UsageError naming the fields where another cache is there, or what of this one no reader would take,
        or a file of others that would be written over; CacheError where the disk refuses.
    """
    for name in (DONE_NAME, LOCKS_NAME, METADATA_NAME, *array_layouts(spec)):
        check_no_links(cache_path, cache_path / name)
    for attempts_left in reversed(range(_ATTEMPTS)):
        if _is_laid_down(cache_path):
            break
        # One job at a time: two with different specs would mix their files.
        with LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s).wait_for(CACHE_LOCK) as lock:
            try:
                if not _is_laid_down(cache_path):
                    clips = clips if isinstance(clips, Sequence) else tuple(clips)
                    _lay_down(cache_path, spec, clips, origin, created_with, projections, lock)
            except CacheError as error:
                if not attempts_left or not lock.may_explain(error):
                    raise
    differences = spec.differences(read_description(cache_path).spec)
    if differences:
        raise UsageError(
            f"{cache_path} holds another cache ({'; '.join(differences[:6])}); "
            "choose another --cache, or the options it was made with"
        )


def _is_laid_down(cache_path: Path) -> bool:
    """Whether a directory is a cache. A network disk may remember for seconds that it was none; a listing is newer."""
    path, deadline = cache_path / METADATA_NAME, time.monotonic() + _REMEMBERED_S
    while not is_there(path):
        if METADATA_NAME not in names_in(cache_path) or time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _lay_down(
    cache_path: Path,
    spec: CacheSpec,
    clips: Sequence[Clip],
    origin: Mapping[str, Any],
    created_with: Mapping[str, str],
    projections: Mapping[int, MapProjection] | None,
    lock: BlockLock,
) -> None:
    if marked_blocks(cache_path):  # their description was lost, and another one would lose them too
        raise CacheDamaged(f"{cache_path}: has finished blocks but no {METADATA_NAME}; repair the cache")
    assert (projections is not None) == spec.recomputes_maps, f"projections for maps {spec.maps!r}"
    projected = {} if projections is None else {PROJECTIONS_NAME: projections_content(projections)}
    lines = clips_lines(clips)
    description = CacheDescription(
        spec=spec,
        origin=origin,
        created_with=created_with,
        clips_sha256=hashlib.sha256(lines).hexdigest(),
        projections_sha256=next(
            (hashlib.sha256(content).hexdigest() for content in projected.values()), None
        ),
    )
    files = description_content(spec, group_document(description), lines)
    check_limits(spec, clip_lines=lines, files=files | projected)
    check_labels(spec, clips)
    check_place(cache_path, spec, files | projected)
    make_directories(cache_path / DONE_NAME)
    paths = {cache_path / name: content for name, content in (projected | files).items()}
    # A job that stood still, and whose lock this job took over, may wake as it names a file: it finds nothing to name.
    for directory in {path.parent for path in paths}:
        make_directories(directory)
        remove_leftovers(directory)
    for path, content in paths.items():
        # The last one makes it a cache. Where that is there, another job took this one's lock over: the caller compares.
        with contextlib.suppress(AlreadyPublished):
            is_last = path == cache_path / METADATA_NAME
            write_atomic(path, content, replace=not is_last, before_naming=lock.check)
