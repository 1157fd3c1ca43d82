"""The second copy of what describes a cache: checking it, and restoring either copy from the other.

Where both copies are intact but differ (a file of another cache was put there), the marks and the manifest
decide which of them is this cache's.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.publish import write_atomic
from evl_cache.store.format.clip_table import ClipTable
from evl_cache.store.format.description import (
    CacheDescription,
    clips_lines,
    description_content,
    parse_description,
    parse_group,
    read_clips,
    read_group,
    recovery_content,
)
from evl_cache.store.format.layout import RECOVERY_NAME, array_layouts, marked_blocks
from evl_cache.store.format.limits import MOST_CLIPS_NBYTES, clips_limit
from evl_cache.store.format.manifest import find_manifest
from evl_cache.store.format.marks import read_mark
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.untrusted.json_text import parse_json

_CLIPS_KEY, _DIGEST_KEY, _GROUP_KEY = b'{"clips":[', b'],"digest":"', b'","group":'


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """An intact description with its clips."""

    group: dict[str, Any]
    description: CacheDescription
    clips: ClipTable


def restore_description(cache_path: Path) -> list[str]:
    """Restore what describes a cache from its intact copy, and the arrays' metadata from the spec.

    Returns: the names of the files that were rewritten.
    Raises: CacheError where both copies are damaged, or it is unclear which of two is this cache's.
    """
    copy, rewritten = _best_copy(cache_path), []
    lines = clips_lines(copy.clips)
    for name, content in description_content(copy.description.spec, copy.group, lines).items():
        path = cache_path / name
        check_no_links(cache_path, path.parent)
        if not DirectoryObjects(cache_path).holds(name, content):
            make_directories(path.parent)
            write_atomic(path, content)
            rewritten.append(name)
    return rewritten


def check_recovery(cache_path: Path, description: CacheDescription) -> str | None:
    """Return what is wrong with the second copy of a description, or None."""
    try:
        copy = _second_copy(cache_path, most_nbytes=clips_limit(description.spec))
    except CacheError as error:
        return str(error)
    if copy.description != description:
        return f"{cache_path / RECOVERY_NAME}: is the second copy of another cache; repair the cache"
    return None


def has_intact_recovery(cache_path: Path) -> bool:
    """Whether the description can be restored from its second copy alone."""
    try:
        _second_copy(cache_path)
    except CacheError:
        return False
    return True


def _first_copy(cache_path: Path) -> _Copy:
    objects = DirectoryObjects(cache_path)
    written = read_group(objects)
    description = parse_description(written, f"{objects.url}/{METADATA_NAME}")
    return _Copy(group=parse_json(written), description=description, clips=read_clips(objects, description))


def _second_copy(cache_path: Path, *, most_nbytes: int = MOST_CLIPS_NBYTES) -> _Copy:
    path = cache_path / RECOVERY_NAME
    try:
        written = DirectoryObjects(cache_path).get(RECOVERY_NAME, most_nbytes=most_nbytes)
        group, lines = _parse_recovery(written, path)
        clips = ClipTable(lines, str(path))
        if clips_lines(clips) != lines or recovery_content(group, lines) != written:
            raise CacheDamaged(f"{path}: is not written as evl-cache writes it; repair the cache")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(f"{path}: cannot be read ({error!r}); repair the cache") from error
    description = parse_group(group, path)
    if clips.sha256 != description.clips_sha256:
        raise CacheDamaged(f"{path}: its clips are not those of its description; repair the cache")
    return _Copy(group=group, description=description, clips=clips)


def _parse_recovery(written: bytes, path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the group document and the lines of `clips.jsonl` in a second copy; as objects they would be ten times as large.

    Whether they are as they should be is for the caller to see, who writes them again.

    Raises: CacheDamaged; ValueError for what is no JSON.
    """
    rows, found, rest = written.removeprefix(_CLIPS_KEY).partition(
        _DIGEST_KEY
    )  # the first: clips hold no list
    own, key, group = rest.partition(_GROUP_KEY)
    if not written.startswith(_CLIPS_KEY) or not found or not key or not group.endswith(b"}\n"):
        raise CacheDamaged(f"{path}: is not written as evl-cache writes it; repair the cache")
    content = parse_json(group.removesuffix(b"}\n"))
    signed = hashlib.sha256(_CLIPS_KEY + rows + b'],"group":')
    signed.update(group.removesuffix(b"\n"))
    if own.decode() != signed.hexdigest():
        raise CacheDamaged(f"{path}: its digest does not match; repair the cache")
    # A quote within a text has a backslash before it: this is between two clips.
    return content, rows.replace(b'"},{"id":"', b'"}\n{"id":"') + b"\n"


def _best_copy(cache_path: Path) -> _Copy:
    copies: list[_Copy] = []
    problems: list[str] = []
    for read in (_first_copy, _second_copy):
        try:
            copies.append(read(cache_path))
        except CacheError as error:
            problems.append(str(error))
    if not copies:
        raise CacheError(
            f"{cache_path}: both copies of the description are damaged ({'; '.join(problems)}); "
            "run the extract command that made the cache into a new directory"
        )
    if len(copies) == 1 or copies[0] == copies[1]:
        return copies[0]
    first, second = (_support(cache_path, copy) for copy in copies)
    if first == second:
        raise CacheError(
            f"{cache_path}: {METADATA_NAME} and {RECOVERY_NAME} are intact but of two caches, and nothing tells "
            "which is this one's; put back the right one, or extract into a new directory"
        )
    return copies[0] if first > second else copies[1]


def _support(cache_path: Path, copy: _Copy) -> tuple[int, int, int]:
    """Count what speaks for a description: marks that fit it, the manifest, metadata of arrays."""
    spec, objects = copy.description.spec, DirectoryObjects(cache_path)
    marks = listed = 0
    for block in sorted(marked_blocks(cache_path)):
        if block >= spec.num_blocks:
            break
        try:
            marks += read_mark(cache_path, block, spec) is not None
        except CacheDamaged:
            continue
    try:
        if (manifest := find_manifest(cache_path, spec)) is not None:
            named = manifest.files.get(METADATA_NAME)
            listed = int(named == content_digest(canonical_json(copy.group)))
    except CacheDamaged:
        pass
    arrays = sum(
        objects.holds(f"{name}/{METADATA_NAME}", canonical_json(layout.metadata(spec)))
        for name, layout in array_layouts(spec).items()
    )
    return marks, listed, arrays
