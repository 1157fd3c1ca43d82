"""Adding to a cache: `grown.json` is written once an addition is complete, and readers see it from then on.

An addition is made as any cache is, in a directory that no reader looks into before. What a killed job left of one does
nothing; the same command goes on with it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import read_limited
from evl_cache.store.disk.lock_files import CACHE_LOCK
from evl_cache.store.disk.locks import EXPIRY_S, LockWatcher
from evl_cache.store.disk.publish import write_atomic
from evl_cache.store.format.description import read_description
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
    check_not_lost,
    find_grown,
    grown_content,
    grown_digest,
    grown_spec,
)
from evl_cache.store.format.index import believed_index
from evl_cache.store.format.layout import LOCKS_NAME
from evl_cache.store.format.manifest import manifest_digest, read_manifest
from evl_cache.store.format.marks import ClipRecord, Mark
from evl_cache.store.format.parts import CachePart, CacheParts, cache_parts
from evl_cache.store.writing.leftovers import remove_leftovers
from evl_cache.store.writing.publication import valid_mark, valid_marks

_COPIES = (
    SECOND_COPY_NAME,
    GROWN_NAME,
)  # `repair` restores the one that readers read, the last, from the other


class GrownRecords:
    """The records of clips, by their rows in a grown cache, as marks have them. Neighbours are asked for in turn."""

    def __init__(self, parts: Sequence[CachePart]) -> None:
        self._parts = parts
        self._marks: dict[Path, Mark] = {}  # of each part the last that was read
        self._indexes = {part.path: believed_index(part.path, part.spec) for part in parts}

    def of(self, row: int) -> ClipRecord | None:
        """Return a clip's record with the frames of all its views; None where a mark is not intact, or not the one read by."""
        record: ClipRecord | None = None
        for part in self._parts:
            if row not in part.box.clips or part.side == LAYERS:
                continue
            if (found := self.in_part(part, row)) is None:
                return None
            if record is None:
                record = found
            elif record.indices is not None:
                record = replace(record, indices=(*record.indices, *(found.indices or ())))
        return record

    def in_part(self, part: CachePart, row: int) -> ClipRecord | None:
        """Return a clip's record with the frames of the views that one part has; None where its mark is not intact."""
        block, place = divmod(row - part.box.clips.start, part.spec.block_clips)
        mark = self._marks.get(part.path)
        if mark is None or mark.block != block:
            mark, index = valid_mark(part.path, part.spec, block), self._indexes[part.path]
            # Features are read by the index, where it is of another mark than lies there now.
            if mark is None or (index is not None and index.file_digest(block) != mark.file_digest):
                return None
            self._marks[part.path] = mark
        return mark.clips[place]


def _records_of(part: CachePart) -> Iterator[tuple[int, ClipRecord]]:
    for mark in valid_marks(part.path, part.spec):
        for row, record in zip(part.spec.clips_of_block(mark.block), mark.clips, strict=True):
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

    checked = False

    def with_it(before: CacheParts) -> Grown:
        nonlocal checked
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
        if not checked:  # it takes a look at all marks
            path = cache_path / addition.place
            more = CachePart(place=path, description=read_description(path), box=addition.box, side=side)
            _check_same_videos(before.parts, more)
            checked = True
        return grown

    _write(cache_path, with_it, lock_expiry_s=lock_expiry_s)


def renew_grown(cache_path: Path, *, lock_expiry_s: float = EXPIRY_S) -> None:
    """Write the digests of a grown cache's members into `grown.json`, as they are now; of another cache do nothing.

    Raises: CacheDamaged where a member that was made again was made of other videos than the rest.
    """
    checked = set[str]()

    def renewed(before: CacheParts) -> Grown | None:
        grown = before.grown
        if grown is not None and (now := _with_digests(cache_path, grown)) != grown:
            # A clip that failed in one member alone may have been made again of a video that was replaced since.
            found = grown_digest([now.cache_digest, *(addition.cache_digest for addition in now.additions)])
            if found not in checked:
                check_videos(before.parts)
                checked.add(found)
        return grown

    if cache_parts(cache_path).grown is not None:
        _write(cache_path, renewed, lock_expiry_s=lock_expiry_s)


def restore_grown(cache_path: Path) -> tuple[list[str], list[str]]:
    """Write `grown.json` again from its second copy, where it is damaged, or the other way round.

    Returns: what was damaged, and the names of the files that were written.
    Raises: CacheDamaged where both are.
    """
    spec = read_description(cache_path).spec
    found, damage = dict[str, Grown | None](), dict[str, str]()
    for name in (GROWN_NAME, SECOND_COPY_NAME):
        try:
            found[name] = find_grown(cache_path, spec, name=name)
        except CacheDamaged as error:
            damage[name] = str(error)
    try:
        check_not_lost(cache_path, spec, found.get(GROWN_NAME))
    except CacheDamaged as error:
        damage.setdefault(GROWN_NAME, str(error))
    intact = found.get(GROWN_NAME) or (found.get(SECOND_COPY_NAME) if damage else None)
    if intact is None and damage:
        raise CacheDamaged(
            f"{'; '.join(damage.values())}: no copy is intact; remove both files, and run the extract commands again, which "
            f"find in {ADDITIONS_NAME}/ what they made"
        )
    if intact is not None and found.get(SECOND_COPY_NAME) != intact and SECOND_COPY_NAME not in damage:
        damage[SECOND_COPY_NAME] = f"{cache_path / SECOND_COPY_NAME}: is not the same as {GROWN_NAME}"
    for name in damage:
        assert intact is not None
        make_directories(cache_path / ADDITIONS_NAME)
        write_atomic(cache_path / name, grown_content(intact))
    return list(damage.values()), list(damage)


def _write(cache_path: Path, change: Callable[[CacheParts], Grown | None], *, lock_expiry_s: float) -> None:
    def due(before: CacheParts) -> bytes | None:
        """Return what is to be written, if anything."""
        grown = change(before)
        content = b"" if grown is None else grown_content(_with_digests(cache_path, grown))
        is_there = all(_holds(cache_path / name, content) for name in _COPIES)
        return None if is_there or not content else content

    if due(cache_parts(cache_path)) is None:  # such as on a disk that cannot be written
        return
    with LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s).wait_for(CACHE_LOCK) as lock:
        if (content := due(cache_parts(cache_path))) is None:
            return
        if not lock.is_held():
            raise CacheError(f"{lock.path} was taken over by another job; run the same command again")
        make_directories(cache_path / ADDITIONS_NAME)
        remove_leftovers(cache_path / ADDITIONS_NAME)
        for name in _COPIES:
            write_atomic(cache_path / name, content)


def _with_digests(cache_path: Path, grown: Grown) -> Grown:
    """Return the same with the digests of the manifests there are. Raises: CacheDamaged where one is missing."""
    additions = []
    for addition in grown.additions:
        path = cache_path / addition.place
        found = _cache_digest(path, read_description(path).spec)
        additions.append(replace(addition, cache_digest=found))
    own = _cache_digest(cache_path, read_description(cache_path).spec)
    return replace(grown, cache_digest=own, additions=tuple(additions))


def _cache_digest(path: Path, spec: CacheSpec) -> str:
    return manifest_digest(path, spec) or read_manifest(path, spec).digest


def check_videos(parts: Sequence[CachePart]) -> None:
    """Check that the parts of a grown cache were made of the same videos and frames. Raises: CacheDamaged."""
    for at, more in enumerate(parts[1:], start=1):
        _check_same_videos(parts[:at], more)


def _check_same_videos(parts: Sequence[CachePart], more: CachePart) -> None:
    """Check that more layers or views of clips are of the same videos, and layers of the same frames, as the rest.

    Raises: CacheDamaged naming a clip.
    """
    side, path = more.side, more.path
    if side == CLIPS:
        return
    records = GrownRecords(parts)
    for row, other in _records_of(more):
        for part in parts:
            if part.side == LAYERS or row not in part.box.clips:
                continue
            record = records.in_part(part, row)
            if record is None or record.error is not None or other.error is not None:
                continue
            if record.source_sha256 != other.source_sha256:
                raise CacheDamaged(
                    f"{path}: {record.id!r} was made of another video than the features that {parts[0].place} has; "
                    "run the same command again with --check-sources, or put the old video back"
                )
            if side == LAYERS and not _same_frames(record, other, part.box, more.box):
                raise CacheDamaged(
                    f"{path}: {record.id!r} was made of other frames than the features that {parts[0].place} has; "
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


def _holds(path: Path, content: bytes) -> bool:
    with contextlib.suppress(OSError, CacheError):
        return read_limited(path, len(content)) == content
    return False
