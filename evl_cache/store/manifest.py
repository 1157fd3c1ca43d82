"""The manifest of a complete cache: every file's size and digest. Its own digest is the cache digest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec, digest
from evl_cache.store.layout import (
    CLIPS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    RECOVERY_NAME,
    array_layouts,
    mark_path,
)
from evl_cache.store.marks import Mark, read_mark
from evl_cache.store.metadata import METADATA_NAME
from evl_cache.store.publish import file_digest, write_json_atomic

MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Files by path relative to the cache, (size in bytes, sha256); digest of the whole."""

    files: Mapping[str, tuple[int, str]]
    digest: str


def description_files(spec: CacheSpec) -> list[str]:
    """Names of the files that describe the cache."""
    return [
        METADATA_NAME,
        CLIPS_NAME,
        RECOVERY_NAME,
        *((PROJECTIONS_NAME,) if spec.recomputes_maps else ()),
        *(f"{name}/{METADATA_NAME}" for name in array_layouts(spec)),
    ]


def manifest_document(root: Path, spec: CacheSpec, marks: Mapping[int, Mark]) -> dict[str, Any]:
    """The manifest that a complete cache with these marks has. Data files are taken from their marks."""
    files = {name: file_digest(root / name) for name in description_files(spec)}
    for block, mark in marks.items():
        path = mark_path(root, block)
        files[path.relative_to(root).as_posix()] = file_digest(path)
        for name, layout in array_layouts(spec).items():
            shard = layout.shard(root, block).relative_to(root).as_posix()
            files[shard] = (mark.files[name].size, mark.files[name].sha256)
    content = {
        "version": MANIFEST_VERSION,
        "feature_id": spec.feature_id,
        "content_id": spec.content_id,
        "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()},
    }
    return {**content, "digest": digest(content)}


def write_manifest(root: Path, spec: CacheSpec) -> str:
    """Write the manifest of a complete cache. Returns the cache digest.

    Raises: CacheError where a block is not done; CacheDamaged where a mark is not intact.
    """
    marks = {}
    for block in range(spec.num_blocks):
        mark = read_mark(root, block, spec)
        if mark is None:
            raise CacheError(f"{root}: block {block} is not done; run the extract command again")
        marks[block] = mark
    document = manifest_document(root, spec, marks)
    write_json_atomic(root / MANIFEST_NAME, document, replace=True)
    return str(document["digest"])


def read_manifest(root: Path, spec: CacheSpec) -> Manifest:
    """Raises: CacheDamaged where it is not intact, or another cache's."""
    path = root / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
        unsigned = {name: value for name, value in content.items() if name != "digest"}
        if content["digest"] != digest(unsigned):
            raise CacheDamaged(f"{path}: its digest does not match; repair the cache")
        if (content["feature_id"], content["content_id"]) != (spec.feature_id, spec.content_id):
            raise CacheDamaged(f"{path}: is the manifest of another cache; repair the cache")
        files = {name: (int(row["size"]), str(row["sha256"])) for name, row in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheDamaged(f"{path}: cannot be read as a manifest ({error!r}); repair the cache") from error
    return Manifest(files=files, digest=content["digest"])
