"""The manifest of a complete cache: every file's size and digest. Its own digest is the cache digest."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import digest
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.publish import write_json_atomic
from evl_cache.store.format.layout import (
    CLIPS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    RECOVERY_NAME,
    array_layouts,
    mark_path,
)
from evl_cache.store.format.marks import Mark, read_mark
from evl_cache.store.objects.objects import DirectoryObjects, Objects, open_objects
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.untrusted.json_text import parse_json

MANIFEST_VERSION = 1
MOST_MANIFEST_NBYTES = 64 << 20


class BlockNotDone(CacheError):
    """The cache has no manifest yet: a block is missing."""


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


def write_manifest(root: Path, spec: CacheSpec, *, before_writing: Callable[[], None] = lambda: None) -> str:
    """Write the manifest of a complete cache. Returns the cache digest.

    before_writing: called when all marks are read; what it raises ends it.

    Raises: BlockNotDone; CacheDamaged where a mark is not intact.
    """
    marks = {}
    for block in range(spec.num_blocks):
        mark = read_mark(root, block, spec)
        if mark is None:
            raise BlockNotDone(f"{root}: block {block} is not done; run the extract command again")
        marks[block] = mark
    document = manifest_document(root, spec, marks)
    before_writing()
    write_json_atomic(root / MANIFEST_NAME, document, replace=True)
    return str(document["digest"])


def read_manifest(root: Path, spec: CacheSpec) -> Manifest:
    """Raises: CacheDamaged where it is not intact, or another cache's."""
    return read_manifest_from(DirectoryObjects(root), spec)


def manifest_at(place: str | Path, spec: CacheSpec) -> Manifest | None:
    """The manifest of the cache at a path or URL; None where it has no intact one."""
    with contextlib.suppress(FileNotFoundError, CacheDamaged):
        return read_manifest_from(open_objects(place), spec)
    return None


def read_manifest_from(objects: Objects, spec: CacheSpec) -> Manifest:
    """The manifest of a cache wherever it lies. Raises: CacheDamaged as `read_manifest`."""
    place = f"{objects.url}/{MANIFEST_NAME}"
    try:
        return parse_manifest(objects.get(MANIFEST_NAME, most_nbytes=MOST_MANIFEST_NBYTES), spec, place)
    except OSError as error:
        raise CacheDamaged(f"{place}: cannot be read as a manifest ({error!r}); repair the cache") from error


def parse_manifest(written: bytes, spec: CacheSpec, place: str) -> Manifest:
    """The manifest of a file's bytes. Raises: as `read_manifest`."""
    try:
        content = parse_json(written)
        unsigned = {name: value for name, value in content.items() if name != "digest"}
        if content["digest"] != digest(unsigned):
            raise CacheDamaged(f"{place}: its digest does not match; repair the cache")
        if (content["feature_id"], content["content_id"]) != (spec.feature_id, spec.content_id):
            raise CacheDamaged(f"{place}: is the manifest of another cache; repair the cache")
        files = {name: (int(row["size"]), str(row["sha256"])) for name, row in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(f"{place}: cannot be read as a manifest ({error!r}); repair the cache") from error
    return Manifest(files=files, digest=content["digest"])
