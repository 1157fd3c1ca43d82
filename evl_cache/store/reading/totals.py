"""What a complete cache takes where it lies, without opening it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.format.description import description_files
from evl_cache.store.format.index import Index
from evl_cache.store.format.index_head import HEAD_NBYTES, INDEX_NAME, parse_head
from evl_cache.store.format.layout import MANIFEST_NAME, array_layouts
from evl_cache.store.format.manifest import (
    BlockNotDone,
    named_size,
    parse_manifest,
    read_beginning,
    read_manifest,
    read_manifest_bytes,
    shards_nbytes,
)
from evl_cache.store.objects.objects import Objects, objects_of, open_objects


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a complete cache takes.

    Attributes:
        cache_digest: the manifest's.
        nbytes: of all shard files that it names.
    """

    cache_digest: str
    nbytes: int


def totals_at(place: str, spec: CacheSpec) -> Totals | None:
    """Return what the cache at a path or URL takes; None where it has no intact manifest.

    The manifest of a large cache has tens of megabytes. Where its first bytes and the index name one digest, the index
    tells the rest. That the manifest is whole is then proved by who opens the cache, and not here.

    Raises: CacheError where it cannot be read.
    """
    objects = open_objects(place)
    try:
        beginning, is_all, named = read_beginning(objects, spec)
        if not is_all and named is not None and (found := _by_index(objects, spec, named)) is not None:
            return found
        written = beginning if is_all else read_manifest_bytes(objects, spec)
        manifest = parse_manifest(written, spec, f"{objects.url}/{MANIFEST_NAME}")
    except (BlockNotDone, CacheDamaged):
        return None
    return Totals(cache_digest=manifest.digest, nbytes=shards_nbytes(manifest, spec))


def copy_totals(path: Path, spec: CacheSpec, index: Index | None) -> tuple[int, int]:
    """Return number and bytes of all files that the manifest in a copy names. Raises: CacheError."""
    if index is not None:
        written = read_manifest_bytes(objects_of(path), spec)  # parsed, it takes seconds
        sizes = [named_size(written, name) for name in description_files(spec)]
        described = [size for size in sizes if size is not None]
        if len(described) == len(sizes):
            files = spec.num_blocks * (1 + len(array_layouts(spec)))
            return len(sizes) + files, sum(described) + int(index.marks["size"].sum()) + index.nbytes
    rows = read_manifest(path, spec).files.values()
    return len(rows), sum(size for size, _ in rows)


def _by_index(objects: Objects, spec: CacheSpec, named: str) -> Totals | None:
    with contextlib.suppress(FileNotFoundError, CacheError):
        written = bytes(objects.get_range(INDEX_NAME, 0, HEAD_NBYTES))
        head = parse_head(written, spec, f"{objects.url}/{INDEX_NAME}")
        if head["cache_digest"] == named:
            return Totals(cache_digest=named, nbytes=head["nbytes"])
    return None
