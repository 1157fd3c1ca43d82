"""A cache's directory: what describes it, who is in it, and the two copies of that.

`zarr.json` of the group holds the spec, `clips.jsonl` the clips. Both are needed to read anything, so
`recovery.json` holds them a second time: a damaged one is restored from it, byte for byte.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.spec import FORMAT_VERSION, CacheSpec, digest
from evl_cache.store.layout import ATTRIBUTE, CLIPS_NAME, DONE_NAME, RECOVERY_NAME, array_layouts
from evl_cache.store.metadata import METADATA_NAME, group_metadata
from evl_cache.store.publish import (
    AlreadyPublished,
    canonical_json,
    is_staging_name,
    make_directories,
    stage_file,
    write_json_atomic,
)


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """What a cache says of itself.

    Attributes:
        spec: see there.
        recipe: arguments that `repair` needs (root of the videos, model, weights); not part of any identity.
        created_with: versions of the software that laid the cache down.
        clips_sha256: of `clips.jsonl`.
    """

    spec: CacheSpec
    recipe: Mapping[str, Any]
    created_with: Mapping[str, str]
    clips_sha256: str


def create_cache(
    root: Path, spec: CacheSpec, clips: Iterable[Clip], *, recipe: Mapping[str, Any], created_with: Mapping[str, str]
) -> None:
    """Lay a cache down, or find the same one there. Several jobs may do so at once.

    Raises: UsageError naming the fields where another cache is there; CacheError where the disk refuses.
    """
    clips = tuple(clips)
    if not (root / METADATA_NAME).exists():
        make_directories(root / DONE_NAME)
        lines = clips_lines(clips)
        group = _group_document(spec, lines, recipe=recipe, created_with=created_with)
        with stage_file(root) as staged:
            staged.write(lines)
            staged.publish_replacing(root / CLIPS_NAME)
        for name, layout in array_layouts(spec).items():
            make_directories(root / name)
            write_json_atomic(root / name / METADATA_NAME, layout.metadata(spec), replace=True)
        write_json_atomic(root / RECOVERY_NAME, _recovery_document(group, clips), replace=True)
        try:  # last: until it is there, nothing is a cache
            write_json_atomic(root / METADATA_NAME, group, replace=False)
        except AlreadyPublished:
            pass  # another job was first; compared below
    found = read_description(root).spec
    differences = spec.differences(found)
    if differences:
        raise UsageError(
            f"{root} holds another cache ({'; '.join(differences[:6])}); choose another --cache, or the options it was made with"
        )


def read_description(root: Path) -> CacheDescription:
    """Raises: CacheError where there is no cache or of another format; CacheDamaged where it is not intact."""
    path = root / METADATA_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CacheError(f"{root}: no cache here ({METADATA_NAME} is missing); give a directory that extract wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CacheDamaged(f"{path}: cannot be read ({error}); repair the cache") from error
    return parse_group(content, path)


def parse_group(content: Any, path: Path) -> CacheDescription:
    """The description in a group document. Raises: as `read_description`."""
    attributes = content.get("attributes") if isinstance(content, dict) else None
    own = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(own, dict):
        raise CacheError(f"{path}: a Zarr group without the attribute {ATTRIBUTE!r}; expected a cache that extract wrote")
    if own.get("format_version") != FORMAT_VERSION and isinstance(own.get("format_version"), int):
        raise CacheError(
            f"{path}: cache format {own['format_version']}; this evl-cache reads format {FORMAT_VERSION}: "
            "install the version that wrote it, or extract again"
        )
    unsigned = {name: value for name, value in own.items() if name != "digest"}
    if own.get("digest") != digest(unsigned) or canonical_json(group_metadata(attributes)) != canonical_json(content):
        raise CacheDamaged(f"{path}: the description's digest does not match; repair the cache")
    try:
        return CacheDescription(
            spec=CacheSpec.from_json(own["spec"]),
            recipe=own["recipe"],
            created_with=own["created_with"],
            clips_sha256=own["clips_sha256"],
        )
    except KeyError as error:
        raise CacheDamaged(f"{path}: {error} is missing; repair the cache") from error


def read_clips(root: Path, description: CacheDescription) -> tuple[Clip, ...]:
    """Clips in their order. Raises: CacheDamaged where the file is not the one the cache was laid down with."""
    path = root / CLIPS_NAME
    try:
        lines = path.read_bytes()
    except OSError as error:
        raise CacheDamaged(f"{path}: cannot be read ({error}); repair the cache") from error
    if hashlib.sha256(lines).hexdigest() != description.clips_sha256:
        raise CacheDamaged(f"{path}: does not match the cache's description; repair the cache")
    return tuple(Clip.from_json(json.loads(line)) for line in lines.splitlines())


def clips_lines(clips: Iterable[Clip]) -> bytes:
    """The bytes of `clips.jsonl`."""
    return b"".join(canonical_json(clip.to_json()) for clip in clips)


def restore_description(root: Path) -> list[str]:
    """Restore what describes the cache from its second copy, and the arrays' metadata from the spec.

    Returns: names of the files that were rewritten.
    Raises: CacheError where both copies are damaged.
    """
    group, clips = _intact_copy(root)
    spec = parse_group(group, root / METADATA_NAME).spec
    wanted = {METADATA_NAME: canonical_json(group), CLIPS_NAME: clips_lines(clips)}
    wanted[RECOVERY_NAME] = canonical_json(_recovery_document(group, clips))
    for name, layout in array_layouts(spec).items():
        wanted[f"{name}/{METADATA_NAME}"] = canonical_json(layout.metadata(spec))
    rewritten = []
    for name, content in wanted.items():
        path = root / name
        if not path.is_file() or path.read_bytes() != content:
            make_directories(path.parent)
            with stage_file(path.parent) as staged:
                staged.write(content)
                staged.publish_replacing(path)
            rewritten.append(name)
    return rewritten


def check_recovery(root: Path, description: CacheDescription) -> str | None:
    """What is wrong with the second copy, or None."""
    try:
        group, clips = _read_recovery(root)
    except CacheDamaged as error:
        return str(error)
    same = parse_group(group, root / RECOVERY_NAME) == description
    if not same or hashlib.sha256(clips_lines(clips)).hexdigest() != description.clips_sha256:
        return f"{root / RECOVERY_NAME}: is the second copy of another cache; repair the cache"
    return None


def remove_leftovers(directory: Path) -> None:
    """Remove staged files: the caller knows that no live writer is in this directory."""
    if directory.is_dir():
        for entry in os.scandir(directory):
            if is_staging_name(entry.name):
                Path(entry.path).unlink(missing_ok=True)


def _group_document(
    spec: CacheSpec, lines: bytes, *, recipe: Mapping[str, Any], created_with: Mapping[str, str]
) -> dict[str, Any]:
    content = {
        "format_version": FORMAT_VERSION,
        "spec": spec.to_json(),
        "recipe": dict(recipe),
        "created_with": dict(created_with),
        "clips_sha256": hashlib.sha256(lines).hexdigest(),
    }
    return group_metadata({ATTRIBUTE: {**content, "digest": digest(content)}})


def _recovery_document(group: Mapping[str, Any], clips: Iterable[Clip]) -> dict[str, Any]:
    content = {"group": dict(group), "clips": [clip.to_json() for clip in clips]}
    return {**content, "digest": digest(content)}


def _read_recovery(root: Path) -> tuple[dict[str, Any], tuple[Clip, ...]]:
    path = root / RECOVERY_NAME
    try:
        content = json.loads(path.read_bytes())
        if content["digest"] != digest({"group": content["group"], "clips": content["clips"]}):
            raise CacheDamaged(f"{path}: its digest does not match; repair the cache")
        if canonical_json(content) != path.read_bytes():
            raise CacheDamaged(f"{path}: is not written as evl-cache writes it; repair the cache")
        return content["group"], tuple(Clip.from_json(row) for row in content["clips"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheDamaged(f"{path}: cannot be read ({error!r}); repair the cache") from error


def _intact_copy(root: Path) -> tuple[dict[str, Any], tuple[Clip, ...]]:
    try:
        description = read_description(root)
        return json.loads((root / METADATA_NAME).read_bytes()), read_clips(root, description)
    except CacheError as first:
        try:
            return _read_recovery(root)
        except CacheDamaged as second:
            raise CacheError(
                f"{root}: both copies of the description are damaged ({first}; {second}); run the extract command that "
                "made the cache into a new directory"
            ) from second
