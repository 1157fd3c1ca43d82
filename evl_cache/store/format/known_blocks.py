"""The blocks of a cache by their marks, which are parsed only where no index or segment knows a mark of these bytes."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.disk.file_system import names_in
from evl_cache.store.format.index import Index, IndexedBlock, open_index
from evl_cache.store.format.index_head import SEGMENTS_NAME
from evl_cache.store.format.layout import mark_path, marked_blocks
from evl_cache.store.format.marks import ClipRecord, Mark, parse_mark, read_mark_bytes

SEGMENT_BLOCKS = 256  # a large cache has few segments, and of one at work most blocks are in one
_SEGMENT_NAME = re.compile(r"([0-9]{6,12})-([0-9]{6,12})\.bin")


def segment_name(first: int, stop: int) -> str:
    """Return the name of the segment of blocks first .. stop-1, relative to the cache."""
    return f"{SEGMENTS_NAME}/{first:06d}-{stop:06d}.bin"


def clip_records(found: Mark | IndexedBlock, spec: CacheSpec, clips: Sequence[Clip]) -> Sequence[ClipRecord]:
    """Return the records of a block's clips, frame counts and frame numbers left out where an index has them.

    Args:
        clips: all of the cache.
    """
    if isinstance(found, Mark):
        return found.clips
    return found.records(clips[row].id for row in spec.clips_of_block(found.block))


class KnownBlocks:
    """Reads the blocks of a cache that are done, finished or not. Marks stay the truth: each is read, and hashed.

    Hashing a mark takes a twentieth of what parsing it takes. An index or a segment that is damaged, or that knows
    other marks, costs time and nothing else.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec) -> None:
        self._cache_path, self._spec = cache_path, spec
        self._whole = open_index(cache_path, spec)  # perhaps of an older manifest
        self._segments: dict[str, Index | None] = {}
        self._names: dict[int, str] = {}
        self._look_for_segments()

    def all(self) -> Iterator[Mark | IndexedBlock]:
        """Yield the blocks that have an intact mark, by their numbers."""
        for block in sorted(marked_blocks(self._cache_path)):
            if block < self._spec.num_blocks and (found := self.intact(block)) is not None:
                yield found

    def intact(self, block: int) -> Mark | IndexedBlock | None:
        """Return a block; None where it has no intact mark."""
        try:
            return self.read(block)
        except CacheDamaged:
            return None

    def read(self, block: int) -> Mark | IndexedBlock | None:
        """Return a block; None where it has no mark. Raises: as `read_mark`."""
        written = read_mark_bytes(self._cache_path, block, self._spec)
        if written is None:
            return None
        if (index := self.knowing(block, written)) is not None:
            try:
                return index.block(block)
            except CacheDamaged:
                pass  # the mark itself tells
        return parse_mark(written, mark_path(self._cache_path, block), block, self._spec)

    def knowing(self, block: int, written: bytes) -> Index | None:
        """Return the index or segment that was made of a mark of these bytes; None where there is none."""
        found = content_digest(written)
        for index in (self._segment_of(block), self._whole):
            if index is not None and index.file_digest(block) == found:
                return index
        return None

    def covering(self, block: int) -> Index | None:
        """Return an index that had a mark of a block, not proved by its bytes: for what is told at a glance only."""
        segment = self._segment_of(block)
        return segment if segment is not None else self._whole

    def refresh(self) -> None:
        """See segments that were written since the last look."""
        self._look_for_segments()

    def _segment_of(self, block: int) -> Index | None:
        name = self._names.get(block)
        if name is None:
            return None
        if name not in self._segments:
            index = open_index(self._cache_path, self._spec, name=name)
            is_named = index is not None and segment_name(index.first, index.stop) == name
            self._segments[name] = index if is_named else None
        return self._segments[name]

    def _look_for_segments(self) -> None:
        for name in names_in(self._cache_path / SEGMENTS_NAME):
            match = _SEGMENT_NAME.fullmatch(name)
            if match is None:
                continue
            blocks = range(int(match[1]), min(int(match[2]), self._spec.num_blocks))
            if len(blocks) <= SEGMENT_BLOCKS:  # a stranger's may claim a hundred million
                self._names |= dict.fromkeys(blocks, segment_name(int(match[1]), int(match[2])))
