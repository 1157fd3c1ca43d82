"""The size of a cache behind a URL: without opening it, and of its copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evl_cache.errors import CacheDamaged, CacheError, WaitEnded
from evl_cache.spec import CacheSpec
from evl_cache.store.format.description import description_files
from evl_cache.store.format.grown import grown_digest
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
)
from evl_cache.store.format.size import CacheSize, cache_size, size_by_manifest
from evl_cache.store.objects.address import is_url
from evl_cache.store.objects.objects import Objects, objects_of, open_objects


class Totals(NamedTuple):
    """What a list of caches says of one.

    Attributes:
        cache_digest: the manifest's; None where it has no intact one.
        nbytes: of all shard files.
        blocks_done: blocks that have a mark.
    """

    cache_digest: str | None
    nbytes: int
    blocks_done: int


def totals_together(each: Sequence[Totals]) -> Totals:
    """Return what a list says of a cache with what was added to it."""
    digests = [totals.cache_digest for totals in each]
    return Totals(
        cache_digest=None if None in digests else grown_digest([digest for digest in digests if digest]),
        nbytes=sum(totals.nbytes for totals in each),
        blocks_done=sum(totals.blocks_done for totals in each),
    )


def totals_at(place: str | Path, spec: CacheSpec) -> Totals:
    """Return what a list says of the cache at a path or URL: behind a URL nothing is known of one that is not complete.

    The manifest of a large cache has tens of megabytes. Where its first bytes and the index name one digest, the index
    tells the rest. That the manifest is whole is then proved by who opens the cache, and not here.

    Raises: CacheError where it cannot be read.
    """
    objects = open_objects(place)
    try:
        beginning, is_all, named = read_beginning(objects, spec)
        nbytes = None if is_all or named is None else _shards_by_index(objects, spec, named)
        if nbytes is not None:
            return Totals(named, nbytes, spec.num_blocks)
    except (BlockNotDone, CacheDamaged, OSError):
        beginning, is_all = b"", False
    if not is_url(place):
        looked = cache_size(place, spec)
        return Totals(looked.cache_digest, looked.shard_nbytes, looked.blocks_done)
    try:
        written = beginning if is_all else read_manifest_bytes(objects, spec)
        manifest = parse_manifest(written, spec, f"{objects.url}/{MANIFEST_NAME}")
    except (BlockNotDone, CacheDamaged):
        return Totals(None, 0, 0)
    return Totals(manifest.digest, size_by_manifest(spec, manifest).shard_nbytes, spec.num_blocks)


def size_of_copy(path: Path, spec: CacheSpec, index: Index | None) -> CacheSize:
    """Return the size of the cache that a directory is the copy of. Raises: CacheError."""
    if index is not None:
        written = read_manifest_bytes(objects_of(path), spec)  # parsed, it takes seconds
        sizes = [named_size(written, name) for name in description_files(spec)]
        described = [size for size in sizes if size is not None]
        if len(described) == len(sizes):
            return CacheSize(
                nbytes=sum(described) + int(index.marks["size"].sum()) + index.nbytes,
                files=len(sizes) + spec.num_blocks * (1 + len(array_layouts(spec))),
                shard_nbytes=index.nbytes,
                blocks_done=spec.num_blocks,
                cache_digest=index.cache_digest,
            )
    return size_by_manifest(spec, read_manifest(path, spec))


def _shards_by_index(objects: Objects, spec: CacheSpec, named: str) -> int | None:
    try:
        written = bytes(objects.get_range(INDEX_NAME, 0, HEAD_NBYTES))
        head = parse_head(written, spec, f"{objects.url}/{INDEX_NAME}")
    except WaitEnded:
        raise
    except (FileNotFoundError, CacheError):
        return None
    return int(head["nbytes"]) if head["cache_digest"] == named else None
