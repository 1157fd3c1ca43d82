"""The second copy of what describes a cache: checking it, and restoring either copy from the other.

Where both copies are intact but differ (a file of another cache was put there), the marks and the manifest
decide which of them is this cache's.
"""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import canonical_json, digest
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.publish import make_directories, stage_file
from evl_cache.store.format.description import (
    MOST_CLIPS_NBYTES,
    CacheDescription,
    clips_lines,
    parse_group,
    read_clips,
    read_description,
    recovery_document,
)
from evl_cache.store.format.layout import CLIPS_NAME, MANIFEST_NAME, RECOVERY_NAME, array_layouts
from evl_cache.store.format.manifest import read_manifest
from evl_cache.store.format.marks import read_mark
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.untrusted.json_text import parse_json


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """One intact description with its clips."""

    group: dict[str, Any]
    description: CacheDescription
    clips: tuple[Clip, ...]


def restore_description(root: Path) -> list[str]:
    """Restore what describes the cache from its second copy, and the arrays' metadata from the spec.

    Returns: names of the files that were rewritten.
    Raises: CacheError where both copies are damaged, or it is unclear which of two is this cache's.
    """
    copy = _best_copy(root)
    wanted = {METADATA_NAME: canonical_json(copy.group), CLIPS_NAME: clips_lines(copy.clips)}
    wanted[RECOVERY_NAME] = canonical_json(recovery_document(copy.group, copy.clips))
    spec = copy.description.spec
    for name, layout in array_layouts(spec).items():
        wanted[f"{name}/{METADATA_NAME}"] = canonical_json(layout.metadata(spec))
    rewritten = []
    for name, content in wanted.items():
        path = root / name
        check_no_links(root, path.parent)
        if _content(root, name) != content:
            make_directories(path.parent)
            with stage_file(path.parent) as staged:
                staged.write(content)
                staged.publish_replacing(path)
            rewritten.append(name)
    return rewritten


def check_recovery(root: Path, description: CacheDescription) -> str | None:
    """What is wrong with the second copy, or None."""
    try:
        copy = _second_copy(root)
    except CacheError as error:
        return str(error)
    if copy.description != description:
        return f"{root / RECOVERY_NAME}: is the second copy of another cache; repair the cache"
    return None


def has_intact_recovery(root: Path) -> bool:
    """Whether the description can be restored from its second copy alone."""
    try:
        _second_copy(root)
    except CacheError:
        return False
    return True


def _first_copy(root: Path) -> _Copy:
    description = read_description(root)
    clips = read_clips(root, description)
    return _Copy(
        group=parse_json(_content(root, METADATA_NAME) or b"{}"), description=description, clips=clips
    )


def _second_copy(root: Path) -> _Copy:
    path = root / RECOVERY_NAME
    try:
        written = DirectoryObjects(root).get(RECOVERY_NAME, most_nbytes=MOST_CLIPS_NBYTES)
        content = parse_json(written)
        group, rows = content["group"], content["clips"]
        if content["digest"] != digest({"group": group, "clips": rows}):
            raise CacheDamaged(f"{path}: its digest does not match; repair the cache")
        if canonical_json(content) != written:
            raise CacheDamaged(f"{path}: is not written as evl-cache writes it; repair the cache")
        clips = tuple(Clip.from_json(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(f"{path}: cannot be read ({error!r}); repair the cache") from error
    description = parse_group(group, path)
    if hashlib.sha256(clips_lines(clips)).hexdigest() != description.clips_sha256:
        raise CacheDamaged(f"{path}: its clips are not those of its description; repair the cache")
    return _Copy(group=group, description=description, clips=clips)


def _content(root: Path, name: str) -> bytes | None:
    """A file's bytes; None where there is none, or something else."""
    with contextlib.suppress(OSError, CacheError):
        return DirectoryObjects(root).get(name, most_nbytes=MOST_CLIPS_NBYTES)
    return None


def _best_copy(root: Path) -> _Copy:
    copies: list[_Copy] = []
    problems: list[str] = []
    for read in (_first_copy, _second_copy):
        try:
            copies.append(read(root))
        except CacheError as error:
            problems.append(str(error))
    if not copies:
        raise CacheError(
            f"{root}: both copies of the description are damaged ({'; '.join(problems)}); "
            "run the extract command that made the cache into a new directory"
        )
    if len(copies) == 1 or copies[0] == copies[1]:
        return copies[0]
    first, second = (_support(root, copy) for copy in copies)
    if first == second:
        raise CacheError(
            f"{root}: {METADATA_NAME} and {RECOVERY_NAME} are intact but of two caches, and nothing tells "
            "which is this one's; put back the right one, or extract into a new directory"
        )
    return copies[0] if first > second else copies[1]


def _support(root: Path, copy: _Copy) -> tuple[int, int, int]:
    """What speaks for a description: marks that fit it, the manifest, metadata of arrays."""
    spec = copy.description.spec
    marks = listed = arrays = 0
    for block in range(spec.num_blocks):
        try:
            marks += read_mark(root, block, spec) is not None
        except CacheDamaged:
            continue
    try:
        named = (
            read_manifest(root, spec).files.get(METADATA_NAME) if (root / MANIFEST_NAME).exists() else None
        )
        content = canonical_json(copy.group)
        listed = int(named == (len(content), hashlib.sha256(content).hexdigest()))
    except CacheDamaged:
        pass
    for name, layout in array_layouts(spec).items():
        arrays += _content(root, f"{name}/{METADATA_NAME}") == canonical_json(layout.metadata(spec))
    return marks, listed, arrays
