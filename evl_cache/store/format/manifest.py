"""The manifest of a complete cache: every file's size and digest. Its own digest is the cache digest."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evl_cache.canonical_json import digest_matches, signed_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import (
    again_if_stale,
    check_no_links,
    disk_error,
    is_refusal,
    open_regular,
)
from evl_cache.store.format.description import description_files
from evl_cache.store.format.layout import MANIFEST_NAME, array_layouts, mark_name
from evl_cache.store.format.limits import manifest_limit
from evl_cache.store.format.marks import ShardFiles
from evl_cache.store.objects.objects import Objects, objects_of, open_objects
from evl_cache.untrusted.json_text import parse_json

MANIFEST_VERSION = 1
_PART_NBYTES = 1 << 20
_BEGINNING_NBYTES = 64 << 10  # of a manifest: the whole of one of few blocks, and of any other its digest


class BlockNotDone(CacheError):
    """The cache has no manifest yet: a block is missing."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every file of a complete cache.

    Attributes:
        files: (size in bytes, sha256) by path relative to the cache.
        digest: the manifest's own, which is the cache digest.
    """

    files: Mapping[str, tuple[int, str]]
    digest: str


class DoneBlock(Protocol):
    """What a manifest names of a block: `Mark` and `IndexedBlock` have it."""

    @property
    def block(self) -> int:
        """Its number."""

    @property
    def file_digest(self) -> tuple[int, str]:
        """Size and sha256 of the file of its mark."""

    @property
    def files(self) -> ShardFiles:
        """Record of each array's shard, by the array's name."""


def block_files(mark: DoneBlock, spec: CacheSpec) -> dict[str, tuple[int, str]]:
    """Return what a manifest says of a block: size and sha256 of its mark and shards, by their paths."""
    files = {mark_name(mark.block): mark.file_digest}
    for name, layout in array_layouts(spec).items():
        files[layout.shard_name(mark.block)] = mark.files[name].digest
    return files


def manifest_content(
    cache_path: Path, spec: CacheSpec, files: Mapping[str, tuple[int, str]]
) -> tuple[bytes, Manifest]:
    """Return the manifest of a complete cache whose blocks have these `block_files`: as written, and as read."""
    files = {name: file_digest(cache_path / name) for name in description_files(spec)} | dict(files)
    content = {
        "version": MANIFEST_VERSION,
        "feature_id": spec.feature_id,
        "content_id": spec.content_id,
        "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()},
    }
    written, own = signed_json(content)
    return written, Manifest(files=files, digest=own)


def read_manifest(place: Path | Objects, spec: CacheSpec) -> Manifest:
    """Return the manifest of a cache. Raises: CacheDamaged where it is missing, not intact, or another cache's."""
    found = find_manifest(place, spec)
    if found is None:
        raise CacheDamaged(f"{objects_of(place).url}/{MANIFEST_NAME}: is missing; repair the cache")
    return found


def find_manifest(place: Path | Objects, spec: CacheSpec) -> Manifest | None:
    """Return the manifest of a cache; None where there is none: it goes whenever a block is done again.

    Raises: CacheDamaged where it is not intact, or another cache's.
    """
    objects = objects_of(place)
    where = f"{objects.url}/{MANIFEST_NAME}"
    try:
        written = objects.get(MANIFEST_NAME, most_nbytes=manifest_limit(spec))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheDamaged(f"{where}: cannot be read as a manifest ({error!r}); repair the cache") from error
    return parse_manifest(written, spec, where)


def manifest_at(place: str | Path, spec: CacheSpec) -> Manifest | None:
    """Return the manifest of the cache at a path or URL; None where it has no intact one."""
    with contextlib.suppress(CacheDamaged):
        return read_manifest(open_objects(place), spec)
    return None


def manifest_digest(cache_path: Path, spec: CacheSpec) -> str | None:
    """Return the digest of a cache's manifest, proved by its bytes, without parsing them; it may have 200 MB.

    None where there is no manifest, or none of this cache as our writers write it; `find_manifest` tells what is wrong.
    Raises: CacheError where the disk refuses.
    """
    path = cache_path / MANIFEST_NAME

    def read() -> str | None:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > manifest_limit(
                spec
            ):  # a stranger's may have terabytes of holes
                return None
            return proved_digest(iter(lambda: file.read(_PART_NBYTES), b""), spec)

    try:
        check_no_links(cache_path, path.parent)
        return again_if_stale(read)
    except OSError as error:
        if is_refusal(error):
            raise disk_error("read", path, error) from error
        return None


def proved_digest(parts: Iterable[bytes], spec: CacheSpec) -> str | None:
    """Return the digest in the bytes of a manifest, which come in parts; None where they do not have it.

    Signed JSON has the digest at a known place, and is the digest of the bytes without it.
    """
    before, after = _around_digest(spec)
    parts = iter(parts)
    first = next(parts, b"")
    if (match := _signed(spec).match(first)) is None:
        return None
    own = hashlib.sha256(before)
    last = first[match.end() - len(after) :]
    for part in parts:
        own.update(last)
        last = part
    own.update(last.removesuffix(b"\n"))
    return match[1].decode() if last.endswith(b"\n") and own.hexdigest() == match[1].decode() else None


def _around_digest(spec: CacheSpec) -> tuple[bytes, bytes]:
    return f'{{"content_id":"{spec.content_id}",'.encode(), f'"feature_id":"{spec.feature_id}",'.encode()


def _signed(spec: CacheSpec) -> re.Pattern[bytes]:
    before, after = _around_digest(spec)
    return re.compile(re.escape(before) + b'"digest":"([0-9a-f]{64})",' + re.escape(after))


def named_size(written: bytes, name: str) -> int | None:
    """Return the size of a file in the bytes of a manifest, without parsing them; None where it is not there as we write it."""
    row = re.compile(re.escape(f'"{name}":{{"sha256":"'.encode()) + b'[0-9a-f]{64}","size":([0-9]{1,20})}')
    at = written.find(f'"{name}":'.encode())
    found = row.match(written, at) if at >= 0 else None
    return int(found[1]) if found else None


def read_beginning(objects: Objects, spec: CacheSpec) -> tuple[bytes, bool, str | None]:
    """Return the first bytes of a manifest, whether they are all, and the digest that they name, which is not proved.

    Raises: BlockNotDone where there is no manifest; CacheError as reading.
    """
    try:
        beginning = bytes(objects.get_range(MANIFEST_NAME, 0, _BEGINNING_NBYTES))
    except FileNotFoundError as error:
        raise _not_complete(objects) from error
    match = _signed(spec).match(beginning)
    return beginning, len(beginning) < _BEGINNING_NBYTES, match[1].decode() if match else None


def _not_complete(objects: Objects) -> BlockNotDone:
    return BlockNotDone(
        f"{objects.url}: has no {MANIFEST_NAME}: it is not complete; finish extract or push, then run this again"
    )


def read_manifest_bytes(objects: Objects, spec: CacheSpec) -> bytes:
    """Return a complete cache's manifest as written. Raises: BlockNotDone where there is none."""
    try:
        return objects.get(MANIFEST_NAME, most_nbytes=manifest_limit(spec))
    except FileNotFoundError as error:
        raise _not_complete(objects) from error


def read_complete(objects: Objects, spec: CacheSpec) -> tuple[bytes, Manifest]:
    """Return a complete cache's manifest, as written and as read.

    Raises: BlockNotDone where there is none; CacheDamaged as `read_manifest`.
    """
    written = read_manifest_bytes(objects, spec)
    return written, parse_manifest(written, spec, f"{objects.url}/{MANIFEST_NAME}")


def parse_manifest(written: bytes, spec: CacheSpec, place: str) -> Manifest:
    """Return the manifest in a file's bytes. Raises: as `read_manifest`."""
    try:
        content = parse_json(written)
        if not isinstance(content, dict) or not digest_matches(content, written):
            raise CacheDamaged(f"{place}: its digest does not match; repair the cache")
        if (content["feature_id"], content["content_id"]) != (spec.feature_id, spec.content_id):
            raise CacheDamaged(f"{place}: is the manifest of another cache; repair the cache")
        files = {name: (int(row["size"]), str(row["sha256"])) for name, row in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(f"{place}: cannot be read as a manifest ({error!r}); repair the cache") from error
    return Manifest(files=files, digest=content["digest"])
