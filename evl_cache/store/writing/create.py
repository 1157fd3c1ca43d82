"""Creating a cache: its description, clip list and empty arrays, laid down once."""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evl_cache.attention_maps import MapProjection
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.locks import CACHE_LOCK, EXPIRY_S, LockWatcher
from evl_cache.store.disk.publish import AlreadyPublished, make_directories, stage_file, write_json_atomic
from evl_cache.store.format.description import (
    _group_document,
    clips_lines,
    read_description,
    recovery_document,
)
from evl_cache.store.format.layout import CLIPS_NAME, DONE_NAME, LOCKS_NAME, RECOVERY_NAME, array_layouts
from evl_cache.store.format.recomputed import projections_content, write_projections
from evl_cache.store.shards.metadata import METADATA_NAME


def create_cache(
    root: Path,
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
        projections: of the spec's layers, where it recomputes maps.

    Raises: UsageError naming the fields where another cache is there; CacheError where the disk refuses.
    """
    for name in (DONE_NAME, LOCKS_NAME, METADATA_NAME, *array_layouts(spec)):
        check_no_links(root, root / name)
    if not (root / METADATA_NAME).exists():
        # One job at a time: two with different specs would mix their files.
        with LockWatcher(root / LOCKS_NAME, expiry_s=lock_expiry_s).wait_for(CACHE_LOCK):
            if not (root / METADATA_NAME).exists():
                _refuse_headless(root)
                _lay_down(
                    root,
                    spec,
                    tuple(clips),
                    origin=origin,
                    created_with=created_with,
                    projections=projections,
                )
    found = read_description(root).spec
    differences = spec.differences(found)
    if differences:
        raise UsageError(
            f"{root} holds another cache ({'; '.join(differences[:6])}); "
            "choose another --cache, or the options it was made with"
        )


def _lay_down(
    root: Path,
    spec: CacheSpec,
    clips: tuple[Clip, ...],
    *,
    origin: Mapping[str, Any],
    created_with: Mapping[str, str],
    projections: Mapping[int, MapProjection] | None,
) -> None:
    assert (projections is not None) == spec.recomputes_maps, f"projections for maps {spec.maps!r}"
    make_directories(root / DONE_NAME)
    lines = clips_lines(clips)
    digests = {"clips_sha256": hashlib.sha256(lines).hexdigest()}
    if projections is not None:
        content = projections_content(projections)
        digests["projections_sha256"] = hashlib.sha256(content).hexdigest()
        write_projections(root, content)
    group = _group_document(spec, digests, origin=origin, created_with=created_with)
    with stage_file(root) as staged:
        staged.write(lines)
        staged.publish_replacing(root / CLIPS_NAME)
    for name, layout in array_layouts(spec).items():
        make_directories(root / name)
        write_json_atomic(root / name / METADATA_NAME, layout.metadata(spec), replace=True)
    write_json_atomic(root / RECOVERY_NAME, recovery_document(group, clips), replace=True)
    # Last: until it is there, nothing is a cache. Where it is, this job was paused for long and another took
    # its lock over: the caller compares.
    with contextlib.suppress(AlreadyPublished):
        write_json_atomic(root / METADATA_NAME, group, replace=False)


def _refuse_headless(root: Path) -> None:
    """Blocks without a description: it was lost, and laying another one down would lose the blocks too."""
    if (root / DONE_NAME).is_dir() and any(path.suffix == ".json" for path in (root / DONE_NAME).iterdir()):
        raise CacheDamaged(f"{root}: has finished blocks but no {METADATA_NAME}; repair the cache")
