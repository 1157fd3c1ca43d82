"""Stage one: the frozen tower runs once per clip, and what it gives is written for good.

Blocks are taken one after another; each is decoded, run, quantised, compressed and committed whole. Whoever
takes a block writes the same bytes: batches are a fixed function of the block.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evl_cache.backbone import check_layers
from evl_cache.clips import ClipList
from evl_cache.errors import UsageError
from evl_cache.extract_block import BlockExtractor, ExtractedBlock, Tower, package_versions
from evl_cache.spec import CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockLock,
    BlockLost,
    FeatureCache,
    LockWatcher,
    create_cache,
    valid_mark,
    write_manifest,
)
from evl_cache.store.size import check_free_space

SHARD_SAMPLES = 64
_WAIT_FOR_OTHERS_S = 0.5

OnClip = Callable[[bool], None]


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How to extract; what is extracted is in the spec.

    Attributes:
        device: of the forward pass.
        batch: samples of one forward pass; part of what makes bytes identical.
        decode_workers: threads that decode.
        retry_failed: redo the blocks that hold failed clips.
        reuse: a cache whose rows of equal features and sources are copied.
        lock_expiry_s: see `store.locks`.
    """

    device: str = "cpu"
    batch: int = 8
    decode_workers: int = 2
    retry_failed: bool = False
    reuse: Path | None = None
    lock_expiry_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("batch", "decode_workers"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What a run did: clips done by this run and by others or before, failures, seconds, cache digest."""

    clips: int
    clips_done_here: int
    failures: tuple[tuple[str, str], ...]
    seconds: float
    cache_digest: str


def make_spec(
    clips: ClipList,
    *,
    dataset: str,
    split: str,
    tower: TowerSpec,
    layers: Sequence[int],
    views: ViewSpec,
    tokens: str = "int8",
    maps: str = "uint8",
    codec: str = "default",
    compute_dtype: str = "float32",
) -> CacheSpec:
    """The spec of a cache of these clips. Raises: UsageError where options contradict the tower."""
    return CacheSpec(
        dataset=dataset,
        split=split,
        classes=clips.classes,
        tower=tower,
        views=views,
        layers=check_layers(layers, tower.blocks),
        tokens=tokens,
        maps=maps,
        codec=codec,
        compute_dtype=compute_dtype,
        num_clips=len(clips.clips),
        content_id=clips.content_id,
        block_clips=max(1, SHARD_SAMPLES // views.per_clip),
    )


def extract(
    clips: ClipList,
    *,
    root: Path,
    cache: Path,
    spec: CacheSpec,
    tower: Tower,
    options: ExtractOptions,
    recipe: dict[str, Any] | None = None,
    on_clip: OnClip = lambda failed: None,
) -> ExtractResult:
    """Extract every clip that is not in the cache yet; run again after a kill, it goes on.

    Args:
        root: what relative clip paths are relative to.
        recipe: stored for `repair`.
        on_clip: called with whether it failed, after each clip, also for those found done.

    Raises: UsageError where another cache is there; CacheError where the disk refuses.
    """
    started = time.monotonic()
    check_free_space(cache, spec)
    versions = package_versions()
    create_cache(cache, spec, clips.clips, recipe=recipe or {}, created_with=versions)
    extractor = BlockExtractor(
        clips.clips,
        root=root,
        cache=cache,
        spec=spec,
        tower=tower,
        device=options.device,
        batch=options.batch,
        workers=options.decode_workers,
        reuse=options.reuse,
        on_clip=on_clip,
    )
    with extractor:
        done_here = _BlockTaker(cache, spec, options, extractor, on_clip).run()
    finished = FeatureCache(cache)
    return ExtractResult(
        clips=spec.num_clips,
        clips_done_here=done_here,
        failures=tuple(finished.failures),
        seconds=time.monotonic() - started,
        cache_digest=write_manifest(cache, spec),
    )


class _BlockTaker:
    """One process's share of the blocks: takes what no living job holds, waits for the rest."""

    def __init__(
        self,
        cache: Path,
        spec: CacheSpec,
        options: ExtractOptions,
        extractor: BlockExtractor,
        on_clip: OnClip,
    ) -> None:
        self.cache, self.spec, self.extractor, self.on_clip = cache, spec, extractor, on_clip
        self._locks = LockWatcher(cache / LOCKS_NAME, expiry_s=options.lock_expiry_s)
        self._redo = self._blocks_with_failures() if options.retry_failed else set()
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._committing: Future[int | None] | None = None

    def run(self) -> int:
        """Returns the clips done by this process."""
        todo, clips_done = set(range(self.spec.num_blocks)), 0
        try:
            while todo:
                took_one = False
                for block in sorted(todo):
                    if self._found_done(block):
                        todo.discard(block)
                    elif (lock := self._locks.take(block)) is not None:
                        took_one = True
                        clips_done += self._take(block, lock, todo)
                self._wait_for_commit(todo)
                if todo and not took_one:
                    time.sleep(_WAIT_FOR_OTHERS_S)
        finally:
            self._committer.shutdown(wait=True)
        return clips_done

    def _take(self, block: int, lock: BlockLock, todo: set[int]) -> int:
        """Extract a locked block and start its commit. Returns its clips."""
        if self._found_done(block):  # finished by another job between the look and the lock
            lock.release()
            todo.discard(block)
            return 0
        try:
            extracted = self.extractor.extract(block, lock)
            self._wait_for_commit(todo)
        except BaseException:
            lock.release()
            raise
        self._redo.discard(block)
        todo.discard(block)
        # In the background: the next block's forward pass overlaps this one's fsync.
        self._committing = self._committer.submit(_commit, extracted, lock)
        return len(extracted.records)

    def _wait_for_commit(self, todo: set[int]) -> None:
        """The block of a commit that lost its lock is looked at again."""
        committing, self._committing = self._committing, None
        lost = None if committing is None else committing.result()
        if lost is not None:
            todo.add(lost)

    def _found_done(self, block: int) -> bool:
        mark = None if block in self._redo else valid_mark(self.cache, self.spec, block)
        if mark is None:
            return False
        for clip in mark.clips:
            self.on_clip(clip.error is not None)
        return True

    def _blocks_with_failures(self) -> set[int]:
        marks = ((block, valid_mark(self.cache, self.spec, block)) for block in range(self.spec.num_blocks))
        return {block for block, mark in marks if mark is not None and any(clip.error for clip in mark.clips)}


def _commit(extracted: ExtractedBlock, lock: BlockLock) -> int | None:
    """Returns the block's number where another job had taken it over."""
    try:
        extracted.writer.commit(extracted.records, extracted.environment)
    except BlockLost:
        return extracted.writer.block
    finally:
        extracted.writer.close()
        lock.release()
    return None
