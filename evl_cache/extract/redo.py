"""What a block that is done keeps when it is redone: every row that passes its checksums; the rest is made again."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.extract.job import ExtractionJob
from evl_cache.extract.prepare import PreparedClip
from evl_cache.spec import CacheSpec
from evl_cache.store import ClipRecord, KnownBlocks, Mark, StoredRow, StoredRows, clip_records

KEPT_ENVIRONMENTS = "kept"  # in a mark: what the rows that a redo kept were made with


@dataclass(frozen=True, kw_only=True)
class BlockRedo:
    """Why a block is redone.

    Attributes:
        again: rows of clips that are made again though the block's mark has a record of them.
        rewrite: whether its files are known to be damaged. Else they stay where no clip comes out otherwise than it is.
    """

    again: frozenset[int] = frozenset()
    rewrite: bool = False


class KeptRows:
    """The rows of one block that is redone, as far as its mark and files promise them; threads may share it."""

    def __init__(self, cache_path: Path, spec: CacheSpec, mark: Mark, redo: BlockRedo) -> None:
        self._stored, self._mark, self.redo = StoredRows(cache_path, spec, mark), mark, redo
        self._first, self._views = spec.clips_of_block(mark.block).start, spec.views.per_clip
        self._tried: dict[int, PreparedClip] = {}

    @property
    def rows(self) -> range:
        """The clips' rows in the cache's list."""
        return range(self._first, self._first + len(self._mark.clips))

    @property
    def again(self) -> list[int]:
        """Rows that are made again, in order."""
        return [row for row in self.rows if row in self.redo.again]

    def record(self, row: int) -> ClipRecord:
        """What the mark says of a clip."""
        return self._mark.clips[row - self._first]

    def is_intact(self, row: int) -> bool:
        """Whether a clip has features that pass their checksums."""
        return self.record(row).error is None and all(map(self._stored.is_intact, self._samples(row)))

    def stored(self, row: int) -> list[StoredRow]:
        """A clip's samples as they lie there. Raises: CacheDamaged where they do not pass their checksums."""
        return [self._stored.read(sample) for sample in self._samples(row)]

    def tried(self, prepared: Mapping[int, PreparedClip]) -> None:
        """Remember clips that were prepared already, by row: none is decoded twice."""
        self._tried |= prepared

    def take(self, row: int) -> PreparedClip | None:
        """A clip as it is kept, or was prepared already; None where it has to be made."""
        if row in self.redo.again:
            return self._tried.pop(row, None)
        record = self.record(row)
        stays = record.error is not None or self.is_intact(row)
        return PreparedClip(record=record, samples=None, is_kept=True) if stays else None

    def environment(self, now: Mapping[str, Any], *, are_new: bool, are_kept: bool) -> dict[str, Any]:
        """What the block's features were made with: now, then, or now and then."""
        then = dict(self._mark.environment)
        if not are_new:
            return then
        before = then.pop(KEPT_ENVIRONMENTS, [])
        others = [*before, *([] if then == dict(now) else [then])] if are_kept else []
        return dict(now) | ({KEPT_ENVIRONMENTS: others} if others else {})

    def _samples(self, row: int) -> range:
        first = (row - self._first) * self._views
        return range(first, first + self._views)


def failed_rows(job: ExtractionJob) -> Iterator[int]:
    """Yield the rows of clips that failed, of the blocks that are done."""
    for found in KnownBlocks(job.cache_path, job.spec).all():
        records = clip_records(found, job.spec, job.clips.clips)
        rows = zip(job.spec.clips_of_block(found.block), records, strict=True)
        yield from (row for row, clip in rows if clip.error is not None)


def rows_by_block(spec: CacheSpec, rows: Iterable[int]) -> dict[int, frozenset[int]]:
    """Return rows of clips by the block they are in."""
    found: dict[int, set[int]] = {}
    for row in rows:
        found.setdefault(row // spec.block_clips, set()).add(row)
    return {block: frozenset(them) for block, them in found.items()}
