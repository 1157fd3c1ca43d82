"""What describes a cache and which clips are in it, in two copies.

`zarr.json` of the group holds the spec, `clips.jsonl` the clips. Both are needed to read anything, so
`recovery.json` holds them a second time: a damaged one is restored from it, byte for byte.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import canonical_json, digest
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere
from evl_cache.spec import FORMAT_VERSION, CacheSpec
from evl_cache.store.format.clip_table import ClipTable, canonical_parts, map_clips
from evl_cache.store.format.layout import (
    ATTRIBUTE,
    CLIPS_NAME,
    PROJECTIONS_NAME,
    RECOVERY_NAME,
    array_layouts,
)
from evl_cache.store.format.limits import MOST_DESCRIPTION_NBYTES, clips_limit
from evl_cache.store.objects.objects import DirectoryObjects, Objects, objects_of
from evl_cache.store.shards.metadata import METADATA_NAME, group_metadata
from evl_cache.untrusted.json_text import parse_json

# By `CacheSpec.chunk_keys`. A version of evl-cache that knows no flat keys refuses format 2, and says so.
_FORMAT_OF = {"folders": 1, "flat": FORMAT_VERSION}


class OtherZarr(CacheError):
    """A Zarr group or array that is no cache."""


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """What a cache says of itself.

    Attributes:
        spec: what it holds.
        origin: arguments that `repair` needs (root of the videos, model, weights); not part of any identity.
        created_with: versions of the software that laid the cache down.
        clips_sha256: digest of `clips.jsonl`.
        projections_sha256: digest of `recompute.safetensors`; None where there is none.
    """

    spec: CacheSpec
    origin: Mapping[str, Any]
    created_with: Mapping[str, str]
    clips_sha256: str
    projections_sha256: str | None = None


def read_description(place: Path | Objects) -> CacheDescription:
    """Return what a cache says of itself.

    Raises: CacheError where there is no cache (NoCacheHere, OtherZarr), or one of another format; CacheDamaged where it
        is not intact.
    """
    objects = objects_of(place)
    return parse_description(read_group(objects), f"{objects.url}/{METADATA_NAME}")


def with_keys_there(spec: CacheSpec, cache_path: Path) -> CacheSpec:
    """Return the spec with the chunk keys of the cache that was begun at a path, where one was: work on that goes on."""
    with contextlib.suppress(CacheError):  # what cannot be read is told where it is used
        return replace(spec, chunk_keys=read_description(cache_path).spec.chunk_keys)
    return spec


def read_group(objects: Objects) -> bytes:
    """Return the bytes of a cache's group document. Raises: as `read_description`."""
    try:
        return objects.get(METADATA_NAME, most_nbytes=MOST_DESCRIPTION_NBYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoCacheHere(
            f"{objects.url}: no cache here ({METADATA_NAME} is missing); give a directory that extract wrote"
        ) from error
    except OSError as error:
        place = f"{objects.url}/{METADATA_NAME}"
        raise CacheDamaged(f"{place}: cannot be read ({error}); repair the cache") from error


def parse_description(written: bytes, place: str) -> CacheDescription:
    """Return the description in the bytes of a group document. Raises: as `read_description`."""
    try:
        content = parse_json(written)
    except ValueError as error:
        raise CacheDamaged(f"{place}: cannot be read ({error}); repair the cache") from error
    return parse_group(content, place)


def parse_group(content: Any, path: str | Path) -> CacheDescription:
    """Return the description in a group document. Raises: as `read_description`."""
    if isinstance(content, dict) and content.get("node_type") == "array":
        raise OtherZarr(f"{path}: is of a Zarr array; expected the directory of a cache that extract wrote")
    attributes: Any = content.get("attributes") if isinstance(content, dict) else None
    own = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(own, dict) or attributes is None:
        raise OtherZarr(
            f"{path}: a Zarr group without the attribute {ATTRIBUTE!r}; expected a cache that extract wrote"
        )
    version = own.get("format_version")
    if isinstance(version, int) and not 1 <= version <= FORMAT_VERSION:
        raise CacheError(
            f"{path}: cache format {version}; this evl-cache reads formats 1 to {FORMAT_VERSION}: "
            "install the version that wrote it, or extract again"
        )
    unsigned = {name: value for name, value in own.items() if name != "digest"}
    same = canonical_json(group_metadata(attributes)) == canonical_json(content)
    if own.get("digest") != digest(unsigned) or not same:
        raise CacheDamaged(f"{path}: the description's digest does not match; repair the cache")
    if type(version) is not int:
        raise CacheDamaged(
            f"{path}: its format version is {str(version)[:20]!r}, expected a number; repair the cache"
        )
    try:
        for name in ("recipe", "created_with"):
            if not isinstance(own[name], dict):
                raise CacheDamaged(f"{path}: its {name} is no object; repair the cache")
        spec = CacheSpec.from_json(own["spec"])
        if _FORMAT_OF[spec.chunk_keys] != version:
            raise CacheDamaged(
                f"{path}: cache format {version} with chunk keys {spec.chunk_keys!r}, which format "
                f"{_FORMAT_OF[spec.chunk_keys]} has: the description was edited; repair the cache"
            )
        return CacheDescription(
            spec=spec,
            origin=own["recipe"],
            created_with=own["created_with"],
            clips_sha256=own["clips_sha256"],
            projections_sha256=own.get("projections_sha256"),
        )
    except KeyError as error:
        raise CacheDamaged(f"{path}: {error} is missing; repair the cache") from error


def read_clips(place: Path | Objects, description: CacheDescription) -> ClipTable:
    """Return the clips of a cache in their order; rows are parsed when they are asked for.

    Raises: CacheDamaged where the file is not the one that was laid down.
    """
    objects = objects_of(place)
    where, most_nbytes = f"{objects.url}/{CLIPS_NAME}", clips_limit(description.spec)
    try:
        if isinstance(objects, DirectoryObjects):
            clips = map_clips(objects.path(CLIPS_NAME), most_nbytes)
        else:
            clips = ClipTable(objects.get(CLIPS_NAME, most_nbytes=most_nbytes), where)
    except OSError as error:
        raise CacheDamaged(f"{where}: cannot be read ({error}); repair the cache") from error
    if clips.sha256 != description.clips_sha256:
        raise CacheDamaged(f"{where}: does not match the cache's description; repair the cache")
    if len(clips) != description.spec.num_clips:
        raise CacheDamaged(
            f"{objects.url}: {len(clips)} clips listed, {description.spec.num_clips} described; repair the cache"
        )
    return clips


def check_labels(clips: ClipTable, spec: CacheSpec, where: str) -> None:
    """Check that the labels of clips are those of the spec's classes. Raises: CacheDamaged."""
    if len(clips) and not 0 <= clips.labels.min() <= clips.labels.max() < len(spec.classes):
        raise CacheDamaged(f"{where}: labels beyond its {len(spec.classes)} classes; repair the cache")


def clips_lines(clips: Iterable[Clip]) -> bytes:
    """Return the bytes of `clips.jsonl`."""
    return b"".join(clips.canonical_parts() if isinstance(clips, ClipTable) else canonical_parts(clips))


def group_document(description: CacheDescription) -> dict[str, Any]:
    """Return the group document that `parse_group` reads a description from."""
    content = {
        "format_version": _FORMAT_OF[description.spec.chunk_keys],
        "spec": description.spec.to_json(),
        "recipe": dict(description.origin),
        "created_with": dict(description.created_with),
        "clips_sha256": description.clips_sha256,
    }
    if description.projections_sha256 is not None:
        content["projections_sha256"] = description.projections_sha256
    return group_metadata({ATTRIBUTE: {**content, "digest": digest(content)}})


def recovery_content(group: Mapping[str, Any], lines: bytes) -> bytes:
    """Return the bytes of `recovery.json`: canonical JSON of the group document, and of the clips as a list.

    Args:
        lines: as `clips_lines` returns them. They are put together as bytes: as objects, a million clips are a gigabyte.
    """
    # No string of JSON holds a line break.
    head = b'{"clips":[' + lines.removesuffix(b"\n").replace(b"\n", b",") + b"],"
    tail = b'"group":' + canonical_json(group).removesuffix(b"\n") + b"}"
    own = hashlib.sha256(head)
    own.update(tail)
    return b"".join((head, f'"digest":"{own.hexdigest()}",'.encode(), tail, b"\n"))


def description_content(spec: CacheSpec, group: Mapping[str, Any], lines: bytes) -> dict[str, bytes]:
    """Return the bytes of the files that describe a cache, by name.

    They are in the order in which they are laid down: the group document comes last, and makes it a cache.
    The file of what recomputes maps is not among them.

    Args:
        lines: of the clips, as `clips_lines` returns them.
    """
    files = {CLIPS_NAME: lines}
    for name, layout in array_layouts(spec).items():
        files[f"{name}/{METADATA_NAME}"] = canonical_json(layout.metadata(spec))
    files[RECOVERY_NAME] = recovery_content(group, lines)
    files[METADATA_NAME] = canonical_json(group)
    return files


def description_files(spec: CacheSpec) -> list[str]:
    """Return the names of all files that describe a cache."""
    return [
        METADATA_NAME,
        CLIPS_NAME,
        RECOVERY_NAME,
        *((PROJECTIONS_NAME,) if spec.recomputes_maps else ()),
        *(f"{name}/{METADATA_NAME}" for name in array_layouts(spec)),
    ]
