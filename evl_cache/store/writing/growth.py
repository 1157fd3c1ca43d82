"""Adding to a cache: `grown.json` is written once an addition is complete, and readers see it from then on.

An addition is made as any cache is, in a directory that no reader looks into before. What a killed job left of one does
nothing; the same command goes on with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.lock_files import CACHE_LOCK
from evl_cache.store.disk.locks import EXPIRY_S, LockWatcher
from evl_cache.store.disk.publish import write_atomic
from evl_cache.store.format.description import CacheDescription, read_description
from evl_cache.store.format.grown import (
    ADDITIONS_NAME,
    CLIPS,
    GROWN_NAME,
    LAYERS,
    SECOND_COPY_NAME,
    Addition,
    Box,
    Grown,
    addition_spec,
    find_grown,
    grown_content,
    grown_spec,
)
from evl_cache.store.format.layout import LOCKS_NAME
from evl_cache.store.format.manifest import read_manifest
from evl_cache.store.format.marks import ClipRecord
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.writing.publication import valid_marks

_COPIES = (
    SECOND_COPY_NAME,
    GROWN_NAME,
)  # `repair` restores the one that readers read, the last, from the other


@dataclass(frozen=True, kw_only=True)
class CachePart:
    """The base of a cache, or what was added to it, as the cache of its own that it is.

    Attributes:
        path: its directory.
        description: what it says of itself.
        box: what it holds of all.
        side: what it added: layers, views or clips; empty for the base.
    """

    path: Path
    description: CacheDescription
    box: Box
    side: str = ""

    @property
    def spec(self) -> CacheSpec:
        """What it holds."""
        return self.description.spec


@dataclass(frozen=True, kw_only=True)
class CacheParts:
    """A cache and what was added to it.

    Attributes:
        parts: the base first.
        spec: what all hold together.
        grown: what names the additions; None where there are none.
    """

    parts: tuple[CachePart, ...]
    spec: CacheSpec
    grown: Grown | None


def cache_parts(cache_path: Path) -> CacheParts:
    """Return the base of a cache and what was added to it.

    Raises: CacheError where there is no cache; CacheDamaged where a description or `grown.json` is not intact.
    """
    description = read_description(cache_path)
    base = description.spec
    grown, whole = find_grown(cache_path, base), base
    parts = [CachePart(path=cache_path, description=description, box=Box.of(base))]
    for addition, (side, box) in zip(
        grown.additions if grown else (), grown.boxes(base) if grown else (), strict=True
    ):
        path = cache_path / addition.place
        try:
            found = read_description(path)
        except NoCacheHere as error:
            raise CacheDamaged(
                f"{path}: holds no cache, though {GROWN_NAME} names it; bring the directory back, or repair the cache"
            ) from error
        classes = found.spec.classes if side == CLIPS else whole.classes
        whole = grown_spec(base, box, addition, classes=classes)
        parts.append(CachePart(path=path, description=found, box=addition.box, side=side))
    return CacheParts(parts=tuple(parts), spec=whole, grown=grown)


def clip_records(cache_path: Path, parts: Sequence[CachePart]) -> Iterator[tuple[int, ClipRecord]]:
    """Yield every clip that is done, by its row in the grown cache, as the part says that has its first layers."""
    for part in parts:
        if part.side in ("", CLIPS):
            for mark in valid_marks(part.path, part.spec):
                rows = part.spec.clips_of_block(mark.block)
                for row, record in zip(rows, mark.clips, strict=True):
                    yield part.box.clips[row], record


def add_to_cache(
    cache_path: Path,
    addition: Addition,
    *,
    lock_expiry_s: float = EXPIRY_S,
) -> None:
    """Have readers see a complete addition. Several jobs may do so at once.

    Args:
        addition: its `cache_digest` is read anew.

    Raises: CacheError where the cache grew otherwise meanwhile; CacheDamaged where the addition is not complete, or was
        made of other videos than the rest.
    """

    def with_it(before: CacheParts) -> Grown:
        base = before.parts[0].spec
        there = before.grown or Grown(base=(base.feature_id, base.content_id), cache_digest="", additions=())
        if any(other.name == addition.name for other in there.additions):
            return there  # by another job of the same command
        grown = replace(there, additions=(*there.additions, addition))
        try:
            side, box = grown.boxes(base)[-1]
        except ValueError as error:
            raise CacheError(
                f"{cache_path}: grew otherwise while {addition.name} was made for it; run the same command again"
            ) from error
        found = read_description(cache_path / addition.place).spec
        classes = found.classes if side == CLIPS else before.spec.classes
        whole = grown_spec(base, box, addition, classes=classes)
        wanted = addition_spec(whole, addition.box, content_id=found.content_id)
        if differences := wanted.differences(found):
            raise CacheError(
                f"{cache_path / addition.place} is not what was to be added ({'; '.join(differences[:4])}); remove it, and "
                "run the same command again"
            )
        _check_videos(before.parts, addition, side, cache_path / addition.place, found)
        return grown

    _write(cache_path, with_it, lock_expiry_s=lock_expiry_s)


def renew_grown(cache_path: Path, *, lock_expiry_s: float = EXPIRY_S) -> None:
    """Write the digests of a grown cache's members into `grown.json`, as they are now; of another cache do nothing."""
    if cache_parts(cache_path).grown is not None:
        _write(cache_path, lambda before: before.grown, lock_expiry_s=lock_expiry_s)


def _write(cache_path: Path, change: Callable[[CacheParts], Grown | None], *, lock_expiry_s: float) -> None:
    def due(before: CacheParts) -> bytes | None:
        """Return what is to be written, if anything."""
        grown = change(before)
        content = b"" if grown is None else grown_content(_with_digests(cache_path, grown))
        there = DirectoryObjects(cache_path)
        return None if all(there.holds(name, content) for name in _COPIES) or not content else content

    if due(cache_parts(cache_path)) is None:  # such as on a disk that cannot be written
        return
    with LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s).wait_for(CACHE_LOCK) as lock:
        if (content := due(cache_parts(cache_path))) is None:
            return
        if not lock.is_held():
            raise CacheError(f"{lock.path} was taken over by another job; run the same command again")
        make_directories(cache_path / ADDITIONS_NAME)
        for name in _COPIES:
            write_atomic(cache_path / name, content)


def _with_digests(cache_path: Path, grown: Grown) -> Grown:
    """Return the same with the digests of the manifests there are. Raises: CacheDamaged where one is missing."""
    additions = []
    for addition in grown.additions:
        path = cache_path / addition.place
        found = read_manifest(path, read_description(path).spec).digest
        additions.append(replace(addition, cache_digest=found))
    own = read_manifest(cache_path, read_description(cache_path).spec).digest
    return replace(grown, cache_digest=own, additions=tuple(additions))


def _check_videos(
    parts: Sequence[CachePart], addition: Addition, side: str, path: Path, spec: CacheSpec
) -> None:
    """Check that more layers or views of clips are of the same videos, and layers of the same frames, as the rest.

    Raises: CacheDamaged naming a clip.
    """
    if side == CLIPS:
        return
    made = dict[int, ClipRecord]()
    for mark in valid_marks(path, spec):
        made |= zip(spec.clips_of_block(mark.block), mark.clips, strict=True)
    for part in parts:
        if not set(part.box.clips) & made.keys() or part.side == LAYERS:
            continue
        for mark in valid_marks(part.path, part.spec):
            for row, record in zip(part.spec.clips_of_block(mark.block), mark.clips, strict=True):
                other = made.get(part.box.clips[row])
                if other is None or record.error is not None or other.error is not None:
                    continue
                if record.source_sha256 != other.source_sha256:
                    raise CacheDamaged(
                        f"{path}: {record.id!r} was made of another video than the features that {parts[0].path} has; "
                        "run the same command again with --check-sources, or put the old video back"
                    )
                if side == LAYERS and not _same_frames(record, other, part.box, addition.box):
                    raise CacheDamaged(
                        f"{path}: {record.id!r} was made of other frames than the features that {parts[0].path} has; "
                        "use the same decoder"
                    )


def _same_frames(record: ClipRecord, other: ClipRecord, box: Box, more: Box) -> bool:
    """Whether two records of a clip name the same frames in the views that both have."""
    mine, theirs = record.indices, other.indices
    if mine is None or theirs is None:
        return True  # an older version recorded none
    if len(mine) == len(theirs):
        return mine == theirs
    at = box.views.start - more.views.start  # of augmented views, some of which were added
    return theirs[at : at + len(mine)] == mine


def digests_differ(parts: CacheParts, found: Mapping[Path, str | None]) -> list[str]:
    """Return what of a grown cache has another digest now than `grown.json` names.

    Args:
        found: digests, by directory of the base and of each addition.
    """
    if parts.grown is None:
        return []
    named = [parts.grown.cache_digest, *(addition.cache_digest for addition in parts.grown.additions)]
    return [
        f"{parts.parts[0].path / GROWN_NAME}: names another digest of {part.path}; run extract again, or repair the cache"
        for part, then in zip(parts.parts, named, strict=True)
        if found.get(part.path) not in (None, then)
    ]
