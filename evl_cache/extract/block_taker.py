"""One process's share of the blocks of a cache: takes what no living job holds, waits for the rest."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evl_cache.errors import TooManyFailures
from evl_cache.extract.block import ExtractedBlock
from evl_cache.extract.failure_limit import FailureLimit
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    LOCKS_NAME,
    REAL,
    BlockLock,
    BlockLost,
    LockWatcher,
    Runtime,
    file_identity,
    mark_path,
    marked_blocks,
    valid_mark,
)

_LEAST_WAIT_S, _LONGEST_WAIT_S = 0.5, 5.0  # between two looks at blocks that others hold
_LOOK_EVERY_S = 2.0
_LOOKS_PER_EXPIRY = 8  # at least: a lock is taken over after several
_MOST_LOSSES = 5  # of one block: then it is no other job that makes its commits fail

OnClip = Callable[[bool], None]


class Extractor(Protocol):
    """What extracts a block."""

    waited: StageSeconds

    def extract(self, block: int, lock: BlockLock) -> ExtractedBlock:
        """Every row of a block handed to a new writer, which the caller commits and closes."""
        ...


class BlockTaker:
    """Extracts blocks that are not done, one at a time, together with other jobs on the same cache.

    Which block it tries: the next number that the rendezvous gives, as long as it gives any; then the first that no
    living job holds. Whether it may have it, the lock on the disk says, and whether it is done, the mark.

    Args:
        cache, spec: where, and what it is. extractor: does the work.
        lock_expiry_s: see `store.locks`.
        redo: blocks to extract again although they are done.
        on_clip: called with whether it failed, for each clip of a block found done.
        next_number: numbers of which no other process of the run gets the same; None where there are none.
        most_failures: how many clips may fail before the run is stopped.
        runtime: clock and threads.
    """

    def __init__(
        self,
        cache: Path,
        spec: CacheSpec,
        extractor: Extractor,
        *,
        lock_expiry_s: float,
        redo: Collection[int],
        on_clip: OnClip,
        next_number: Callable[[], int | None] = lambda: None,
        most_failures: FailureLimit | None = None,
        runtime: Runtime = REAL,
    ) -> None:
        self._most_failures = most_failures
        self._clips_seen = self._clips_failed = 0
        self.cache, self.spec, self.extractor, self.on_clip = cache, spec, extractor, on_clip
        self._runtime, self._next_number, self._numbers_are_through = runtime, next_number, False
        self._looked_s = -math.inf
        self._locks = LockWatcher(cache / LOCKS_NAME, expiry_s=lock_expiry_s, runtime=runtime)
        self._longest_wait_s = max(_LEAST_WAIT_S, min(_LONGEST_WAIT_S, lock_expiry_s / _LOOKS_PER_EXPIRY))
        self._redo = {block: file_identity(mark_path(cache, block)) for block in redo}
        self._todo: set[int] = set()
        self._losses: Counter[int] = Counter()
        self._clips_done = 0
        self._committer = runtime.executor("commit")
        self._committing: Future[_Committed] | None = None

    def run(self, blocks: Collection[int]) -> int:
        """Until all of these blocks are done, by whomever. Returns the clips done by this process.

        Raises: CacheError where the disk refuses.
        """
        self._todo, wait_s = set(blocks), _LEAST_WAIT_S
        try:
            while True:
                self.look_around()
                if (taken := self._take_one()) is not None:
                    self._extract(*taken)
                    wait_s = _LEAST_WAIT_S
                    continue
                self._wait_for_commit()
                if not self._todo and not self._reopen(blocks):
                    return self._clips_done
                self._runtime.sleep(wait_s)
                wait_s = min(1.5 * wait_s, self._longest_wait_s)  # many waiting jobs do not besiege a disk
        finally:
            self._committer.shutdown(wait=True)

    def look_around(self) -> None:
        """What others have done meanwhile leaves the list, and is told: a mark is all that counts."""
        self._looked_s = self._runtime.now_s()
        for block in sorted(self._todo & marked_blocks(self.cache)):
            if self._found_done(block):
                self._todo.discard(block)

    def look_around_at_times(self) -> None:
        """As `look_around`, unless that was just now: for those who watch while a block takes long."""
        if self._runtime.now_s() - self._looked_s > _LOOK_EVERY_S:
            self.look_around()

    def _reopen(self, blocks: Collection[int]) -> bool:
        """Whether a block that was done is not any more: withdrawn by a writer that had been paused, say."""
        self._todo = set(blocks) - marked_blocks(self.cache)
        return bool(self._todo)

    def _take_one(self) -> tuple[int, BlockLock] | None:
        while not self._numbers_are_through and (block := self._next_number()) is not None:
            self._numbers_are_through = block >= self.spec.num_blocks
            if block in self._todo and (lock := self._locks.take(block)) is not None:
                return block, lock
        # Numbers are through, or cannot be had now: what is left is held, was lost, or is free.
        for block in sorted(self._todo):
            if (lock := self._locks.take(block)) is not None:
                return block, lock
        return None

    def _extract(self, block: int, lock: BlockLock) -> None:
        """Extract a locked block and start its commit."""
        if self._found_done(block):  # finished by another job between the look and the lock
            lock.release()
            self._todo.discard(block)
            return
        self._todo.discard(block)
        extracted: ExtractedBlock | None = None
        try:
            extracted = self.extractor.extract(block, lock)
            self._wait_for_commit()
        except BaseException:
            if extracted is not None:
                extracted.writer.close()
            lock.release()
            raise
        if self._found_done(block):  # meanwhile, by a job that had been taken for dead
            extracted.writer.close()
            lock.release()
            return
        self._redo.pop(block, None)
        # In the background: the next block's forward pass overlaps this one's fsync.
        self._committing = self._committer.submit(_commit, extracted, lock)

    def _wait_for_commit(self) -> None:
        """The block of a commit that another job came before is looked at again."""
        committing, self._committing = self._committing, None
        if committing is None:
            return
        with self.extractor.waited.of("writing"):
            committed = committing.result()
        if committed.lost is None:
            self._clips_done += committed.clips
            self._check_failures(committed.clips, committed.failures)
            return
        self._todo.add(committed.block)
        self._losses[committed.block] += 1
        if self._losses[committed.block] >= _MOST_LOSSES:
            raise committed.lost

    def _check_failures(self, clips: int, failures: Sequence[str]) -> None:
        """At the end of a block, so that what failed is in its mark. Raises: TooManyFailures."""
        self._clips_seen += clips
        self._clips_failed += len(failures)
        limit = self._most_failures
        if limit is not None and limit.is_exceeded(self._clips_failed, of=self._clips_seen):
            raise TooManyFailures(
                f"{self._clips_failed} of {self._clips_seen} clips failed, more than --max-failures {limit}; the last: "
                f"{failures[-1] if failures else 'found failed'}; see evl-cache info --failures {self.cache}, mend them "
                "and use --retry-failed"
            )

    def _found_done(self, block: int) -> bool:
        if block in self._redo and self._redo[block] == file_identity(mark_path(self.cache, block)):
            return False  # the mark that is to be replaced
        mark = valid_mark(self.cache, self.spec, block)
        if mark is None:
            return False
        for clip in mark.clips:
            self.on_clip(clip.error is not None)
        self._check_failures(len(mark.clips), [clip.error for clip in mark.clips if clip.error is not None])
        return True


@dataclass(frozen=True, kw_only=True)
class _Committed:
    """What became of a block. `failures`: reasons. `lost`: another job had taken it over."""

    block: int
    clips: int
    failures: tuple[str, ...]
    lost: BlockLost | None


def blocks_with_failures(cache: Path, spec: CacheSpec) -> set[int]:
    """Blocks that are done, but for clips that failed."""
    marks = ((block, valid_mark(cache, spec, block)) for block in range(spec.num_blocks))
    return {block for block, mark in marks if mark is not None and any(clip.error for clip in mark.clips)}


def _commit(extracted: ExtractedBlock, lock: BlockLock) -> _Committed:
    lost = None
    try:
        extracted.writer.commit(extracted.records, extracted.environment)
    except BlockLost as error:
        lost = error
    finally:
        extracted.writer.close()
        lock.release()
    return _Committed(
        block=extracted.writer.block,
        clips=len(extracted.records),
        failures=tuple(record.error for record in extracted.records if record.error is not None),
        lost=lost,
    )
