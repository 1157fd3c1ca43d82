"""One process's share of the blocks of a cache: takes what no living job holds, waits for the rest."""

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Generic, NamedTuple, Protocol, TypeVar

from evl_cache.errors import CacheError
from evl_cache.extract.block import ExtractedBlock
from evl_cache.extract.failure_limit import FailureCount
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnClip
from evl_cache.extract.redo import BlockRedo
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.store import (
    LOCKS_NAME,
    REAL,
    BlockLock,
    BlockLost,
    ClipRecord,
    KnownBlocks,
    LockWatcher,
    RowsAtStake,
    Runtime,
    clip_records,
    file_identity,
    finished_blocks,
    is_in_redo,
    mark_path,
    valid_mark,
    write_segment_of,
)

_LEAST_WAIT_S, _LONGEST_WAIT_S = 0.5, 5.0  # between two looks at blocks that others hold
_LOOK_EVERY_S = 2.0
_LOOKS_PER_EXPIRY = 8  # at least: a lock is taken over after several
_MOST_LOSSES = 5  # of one block: after so many, its commits fail for another reason than other jobs


class Begun(Protocol):
    """A block that is being extracted."""

    @property
    def is_ready(self) -> bool:
        """Whether all of it is done but for the commit."""
        ...


BegunT = TypeVar("BegunT", bound=Begun)


class Extractor(Protocol[BegunT]):
    """What extracts blocks, in the order in which they are begun, in threads of its own."""

    waited: StageSeconds

    @property
    def has_room(self) -> bool:
        """Whether another block should be begun."""
        ...

    def begin(self, block: int, lock: BlockLock, redo: BlockRedo | None = None) -> BegunT | None:
        """Send a block on its way; None where it stays as it is."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until something has changed, for at most so long. Raises: what went wrong."""
        ...

    def end(self, begun: BegunT) -> ExtractedBlock:
        """Return a block that is ready, with its writer, which the caller commits and closes."""
        ...

    def close(self) -> None:
        """Drop what was begun and not ended."""
        ...


class _Taken(NamedTuple, Generic[BegunT]):
    """A block of this process that is being extracted."""

    block: int
    lock: BlockLock
    begun: BegunT


class _Commit(NamedTuple):
    """A block that is being committed; `failed_before`: ids of clips that had failed in the block it replaces."""

    block: int
    records: Sequence[ClipRecord]
    failed_before: Collection[str]
    future: "Future[CacheError | None]"


class BlockTaker(Generic[BegunT]):
    """Extracts blocks that are not done, together with other jobs on the same cache.

    The next block is begun before the one before is ready, so that what decodes and the device have work, and its commit
    runs beside. It tries the blocks whose numbers the rendezvous gives, as long as it gives any; then the first block that no
    living job holds. The lock on the disk decides whether it may have a block, the mark whether the block is done.

    Args:
        job: the cache.
        extractor: does the work.
        options: of which `lock_expiry_s` and `most_failures` count here.
        redo: why blocks are done again although they are done, by block.
        on_clip: called with whether it failed, for each clip of a block found done.
        next_number: gives numbers, each to one process of the run only; None where there are none.
        runtime: clock and threads.

    Attributes:
        stayed: why a block stays as it is, though it was to be redone: it has features that cannot be made again.
    """

    def __init__(
        self,
        job: ExtractionJob,
        extractor: Extractor[BegunT],
        *,
        options: ExtractOptions,
        redo: Mapping[int, BlockRedo] | None = None,
        on_clip: OnClip = lambda failed: None,
        next_number: Callable[[], int | None] = lambda: None,
        runtime: Runtime = REAL,
    ) -> None:
        self._cache_path, self._spec = job.cache_path, job.spec
        self._extractor, self._on_clip, self._runtime = extractor, on_clip, runtime
        self._failures = FailureCount(limit=options.most_failures, uncounted=job.known_missing)
        self._clips_done = 0
        self._next_number, self._numbers_are_through = next_number, False
        self._looked_s = -math.inf
        expiry_s = options.lock_expiry_s
        self._locks = LockWatcher(self._cache_path / LOCKS_NAME, expiry_s=expiry_s, runtime=runtime)
        self._longest_wait_s = max(_LEAST_WAIT_S, min(_LONGEST_WAIT_S, expiry_s / _LOOKS_PER_EXPIRY))
        self._redo = dict(redo or {})
        self._marks_before = {
            block: file_identity(mark_path(self._cache_path, block)) for block in self._redo
        }
        self.stayed: dict[int, str] = {}
        self._known, self._clips = KnownBlocks(self._cache_path, self._spec), job.clips.clips
        self._todo: set[int] = set()
        self._losses: Counter[int] = Counter()
        self._begun: deque[_Taken[BegunT]] = deque()
        self._found_none_s = -math.inf  # when no block was to be had
        self._committer = runtime.executor("commit")
        self._committing: _Commit | None = None

    def run(self, blocks: Collection[int]) -> int:
        """Work until all of these blocks are done, by whomever. Return the clips done by this process.

        Raises: CacheError where the disk refuses.
        """
        self._todo, wait_s = set(blocks), _LEAST_WAIT_S
        try:
            self.look_around()
            while True:
                if self._begun and self._begun[0].begun.is_ready:
                    self._end_first()
                elif self._begin_one():
                    wait_s = _LEAST_WAIT_S
                    if self._begun:
                        self._extractor.wait(0.0)  # what was found done, or stays, may be many blocks
                elif self._begun:
                    self._extractor.wait(_LOOK_EVERY_S)
                    self.look_around_at_times()  # so that a progress line counts the clips of all jobs
                else:
                    self._wait_for_commit()
                    if not self._todo and not self._reopen(blocks):
                        return self._clips_done
                    self._runtime.sleep(wait_s)
                    # Many waiting jobs do not besiege a disk.
                    wait_s = min(1.5 * wait_s, self._longest_wait_s)
                    self.look_around()
        except BaseException:
            try:
                self._committer.shutdown(
                    wait=True
                )  # what is ready is committed; that needs the extractor's threads
                self._extractor.close()
            finally:
                for taken in self._begun:
                    taken.lock.release()
            raise
        finally:
            self._committer.shutdown(wait=True)

    def look_around(self) -> None:
        """Report what other jobs have done, and take it off the list. Only a mark says that a block is done."""
        self._looked_s = self._runtime.now_s()
        for block in sorted(self._todo & finished_blocks(self._cache_path)):
            if self._found_done(block):
                self._todo.discard(block)

    def look_around_at_times(self) -> None:
        """Do `look_around`, at most every two seconds, so that the progress line moves while a block takes long."""
        if self._runtime.now_s() - self._looked_s > _LOOK_EVERY_S:
            self.look_around()

    def _reopen(self, blocks: Collection[int]) -> bool:
        """Whether blocks are to be done again, because a job that had been paused withdrew its mark, say."""
        self._todo = set(blocks) - finished_blocks(self._cache_path) - self.stayed.keys()
        return bool(self._todo)

    def _take_one(self) -> tuple[int, BlockLock] | None:
        # Not where nothing is left: the process that keeps the numbers may have ended, as all is done.
        while self._todo and not self._numbers_are_through and (block := self._next_number()) is not None:
            self._numbers_are_through = block >= self._spec.num_blocks
            if block in self._todo and (lock := self._locks.take(block)) is not None:
                return block, lock
        # No numbers are left, or the rendezvous does not answer: try what is left, whether free or held.
        for block in sorted(self._todo):
            if (lock := self._locks.take(block)) is not None:
                return block, lock
        return None

    def _begin_one(self) -> bool:
        """Lock a block and begin it, where there is room for one and one is to be had."""
        looked_just_now = self._runtime.now_s() - self._found_none_s < _LOOK_EVERY_S
        if self._begun and (looked_just_now or not self._extractor.has_room):
            return False
        if (found := self._take_one()) is None:
            self._found_none_s = self._runtime.now_s()
            return False
        block, lock = found
        try:
            self._begin(block, lock)
        except BaseException:
            lock.release()
            raise
        return True

    def _begin(self, block: int, lock: BlockLock) -> None:
        self._todo.discard(block)
        if self._found_done(block):  # finished by another job between the look and the lock
            lock.release()
            return
        redo = self._redo.get(block)
        if is_in_redo(self._cache_path, block):  # begun by a job that died, or that was paused for long
            redo = BlockRedo(again=redo.again if redo else frozenset(), rewrite=True)
        begun = self._extractor.begin(block, lock, redo)
        if begun is None:  # nothing is to be changed: it counts as found done
            self._redo.pop(block, None)
            self._found_done(block)
            lock.release()
            return
        self._begun.append(_Taken(block, lock, begun))

    def _end_first(self) -> None:
        """Start the commit of the first begun block, which is ready."""
        extracted = self._extractor.end(self._begun[0].begun)
        block, lock, _ = self._begun.popleft()
        try:
            self._wait_for_commit()
            # The block may have been done meanwhile, by a job that had been taken for dead.
            if self._found_done(block):
                self._redo.pop(block, None)
                extracted.writer.close()
                lock.release()
                return
            # Before the commit, so that what went wrong is not recorded.
            failed_before = self._failed_before(block)
            self._failures.after(extracted.made, expected=failed_before).check(self._cache_path)
        except BaseException:
            extracted.writer.close()
            lock.release()
            raise
        # In the background: what follows goes on meanwhile.
        commit = self._committer.submit(self._commit, block, extracted, lock)
        self._committing = _Commit(block, extracted.made, failed_before, commit)

    def _commit(self, block: int, extracted: ExtractedBlock, lock: BlockLock) -> CacheError | None:
        """Publish a block. Return the error where another job had taken it over, or where features would be lost."""
        try:
            extracted.writer.commit(extracted.records, extracted.environment)
        except (BlockLost, RowsAtStake) as error:
            return error
        finally:
            extracted.writer.close()
            lock.release()
        write_segment_of(self._cache_path, self._spec, block)
        return None

    def _wait_for_commit(self) -> None:
        """Wait for the block being committed; where another job had taken it over, it is to be done again."""
        committing, self._committing = self._committing, None
        if committing is None:
            return
        block, records = committing.block, committing.records
        # It is waited for where the next block is ready before: the disk is slower than the rest.
        with self._extractor.waited.of("writing"):
            lost = committing.future.result()
        if isinstance(lost, RowsAtStake):
            self.stayed[block] = str(lost)
            return
        if lost is None:
            self._redo.pop(block, None)
            self._clips_done += len(records)
            self._failures = self._failures.after(records, expected=committing.failed_before)
            return
        self._todo.add(block)
        self._losses[block] += 1
        if self._losses[block] >= _MOST_LOSSES:
            raise lost

    def _failed_before(self, block: int) -> Collection[str]:
        """The clips that failed in the block that is replaced: that was accepted then."""
        mark = valid_mark(self._cache_path, self._spec, block) if block in self._redo else None
        return () if mark is None else {clip.id for clip in mark.clips if clip.error is not None}

    def _found_done(self, block: int) -> bool:
        before = self._marks_before.get(block) if block in self._redo else None
        if before is not None and before == file_identity(mark_path(self._cache_path, block)):
            return False  # the mark that is to be replaced
        if is_in_redo(self._cache_path, block):
            return False
        if (found := self._known.intact(block)) is None:
            return False
        records = clip_records(found, self._spec, self._clips)
        for clip in records:
            self._on_clip(clip.error is not None)
        self._failures = self._failures.after_others(records)
        self._failures.check(self._cache_path, is_written=True)
        return True
