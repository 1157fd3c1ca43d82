"""What a complete cache takes where it lies, without opening it."""

import contextlib
from dataclasses import dataclass

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.format.index_head import HEAD_NBYTES, INDEX_NAME, parse_head
from evl_cache.store.format.layout import MANIFEST_NAME
from evl_cache.store.format.manifest import (
    BlockNotDone,
    parse_manifest,
    read_beginning,
    read_manifest_bytes,
)
from evl_cache.store.objects.objects import Objects, open_objects


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a complete cache takes.

    Attributes:
        cache_digest: the manifest's.
        files, nbytes: number and bytes of all files that it names.
    """

    cache_digest: str
    files: int
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
    files, nbytes = manifest.totals
    return Totals(cache_digest=manifest.digest, files=files, nbytes=nbytes)


def _by_index(objects: Objects, spec: CacheSpec, named: str) -> Totals | None:
    with contextlib.suppress(FileNotFoundError, CacheError):
        written = bytes(objects.get_range(INDEX_NAME, 0, HEAD_NBYTES))
        head = parse_head(written, spec, f"{objects.url}/{INDEX_NAME}")
        if head["cache_digest"] == named and head["totals"] is not None:
            files, nbytes = head["totals"]
            return Totals(cache_digest=named, files=files, nbytes=nbytes)
    return None
