"""A cache's directory: what describes it, who is in it, and the two copies of that.

`zarr.json` of the group holds the spec, `clips.jsonl` the clips. Both are needed to read anything, so
`recovery.json` holds them a second time: a damaged one is restored from it, byte for byte.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import canonical_json, digest
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere
from evl_cache.spec import FORMAT_VERSION, CacheSpec
from evl_cache.store.format.layout import (
    ATTRIBUTE,
    CLIPS_NAME,
)
from evl_cache.store.objects.objects import DirectoryObjects, Objects
from evl_cache.store.shards.metadata import METADATA_NAME, group_metadata
from evl_cache.untrusted.json_text import parse_json

# Read whole and parsed: far more than the largest data sets need, far less than a computer's memory.
MOST_DESCRIPTION_NBYTES = 16 << 20
MOST_CLIPS_NBYTES = 256 << 20
_CLIPS_AT_A_TIME = 10_000


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """What a cache says of itself.

    Attributes:
        spec: see there.
        origin: arguments that `repair` needs (root of the videos, model, weights); not part of any identity.
        created_with: versions of the software that laid the cache down.
        clips_sha256: of `clips.jsonl`. projections_sha256: of `recompute.safetensors`, where there is one.
    """

    spec: CacheSpec
    origin: Mapping[str, Any]
    created_with: Mapping[str, str]
    clips_sha256: str
    projections_sha256: str | None = None


def read_description(root: Path) -> CacheDescription:
    """Raises: CacheError where there is none or of another format; CacheDamaged where it is not intact."""
    return read_description_from(DirectoryObjects(root))


def read_description_from(objects: Objects) -> CacheDescription:
    """The description of a cache wherever it lies. Raises: as `read_description`."""
    return parse_description(read_group(objects), f"{objects.url}/{METADATA_NAME}")


def read_group(objects: Objects) -> bytes:
    """The bytes of a cache's group document. Raises: as `read_description`."""
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
    """The description in the bytes of a group document. Raises: as `read_description`."""
    try:
        content = parse_json(written)
    except ValueError as error:
        raise CacheDamaged(f"{place}: cannot be read ({error}); repair the cache") from error
    return parse_group(content, place)


def parse_group(content: Any, path: str | Path) -> CacheDescription:
    """The description in a group document. Raises: as `read_description`."""
    attributes: Any = content.get("attributes") if isinstance(content, dict) else None
    own = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(own, dict) or attributes is None:
        raise CacheError(
            f"{path}: a Zarr group without the attribute {ATTRIBUTE!r}; expected a cache that extract wrote"
        )
    version = own.get("format_version")
    if version != FORMAT_VERSION and isinstance(version, int):
        raise CacheError(
            f"{path}: cache format {version}; this evl-cache reads format {FORMAT_VERSION}: "
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
        return CacheDescription(
            spec=CacheSpec.from_json(own["spec"]),
            origin=own["recipe"],
            created_with=own["created_with"],
            clips_sha256=own["clips_sha256"],
            projections_sha256=own.get("projections_sha256"),
        )
    except KeyError as error:
        raise CacheDamaged(f"{path}: {error} is missing; repair the cache") from error


def read_clips(root: Path, description: CacheDescription) -> tuple[Clip, ...]:
    """Clips in their order. Raises: CacheDamaged where the file is not the one that was laid down."""
    return read_clips_from(DirectoryObjects(root), description)


def read_clips_from(objects: Objects, description: CacheDescription) -> tuple[Clip, ...]:
    """The clips of a cache wherever it lies. Raises: as `read_clips`."""
    place = f"{objects.url}/{CLIPS_NAME}"
    try:
        lines = objects.get(CLIPS_NAME, most_nbytes=MOST_CLIPS_NBYTES)
    except OSError as error:
        raise CacheDamaged(f"{place}: cannot be read ({error}); repair the cache") from error
    if hashlib.sha256(lines).hexdigest() != description.clips_sha256:
        raise CacheDamaged(f"{place}: does not match the cache's description; repair the cache")
    return parse_clips(lines, place)


def parse_clips(lines: bytes, place: str) -> tuple[Clip, ...]:
    """Clips of the bytes of `clips.jsonl`. Raises: CacheDamaged where they are no clips."""
    rows, out = lines.splitlines(), []
    try:
        for start in range(
            0, len(rows), _CLIPS_AT_A_TIME
        ):  # one call for many: a large list has 240,000 lines
            part = parse_json(b"[" + b",".join(rows[start : start + _CLIPS_AT_A_TIME]) + b"]")
            out += [Clip.from_json(row) for row in part]
    except ValueError as error:
        raise CacheDamaged(f"{place}: is no list of clips ({error}); repair the cache") from error
    return tuple(out)


def clips_lines(clips: Iterable[Clip]) -> bytes:
    """The bytes of `clips.jsonl`."""
    return b"".join(canonical_json(clip.to_json()) for clip in clips)


def _group_document(
    spec: CacheSpec, digests: Mapping[str, str], *, origin: Mapping[str, Any], created_with: Mapping[str, str]
) -> dict[str, Any]:
    content = {
        "format_version": FORMAT_VERSION,
        "spec": spec.to_json(),
        "recipe": dict(origin),
        "created_with": dict(created_with),
        **digests,
    }
    return group_metadata({ATTRIBUTE: {**content, "digest": digest(content)}})


def recovery_document(group: Mapping[str, Any], clips: Iterable[Clip]) -> dict[str, Any]:
    """The JSON of `recovery.json`."""
    content = {"group": dict(group), "clips": [clip.to_json() for clip in clips]}
    return {**content, "digest": digest(content)}
