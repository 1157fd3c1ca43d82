"""Stage one: the frozen tower runs once per clip, and its features are written for good.

Blocks are taken one after another, the next one before the last is ready. Each is decoded, run, quantised, compressed and
committed whole. Whoever takes a block writes the same bytes, because its batches follow from the block alone.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from evl_cache.attention_maps import MapProjection
from evl_cache.canonical_json import digest
from evl_cache.clips import ClipList
from evl_cache.errors import CacheDamaged, CacheError, reason_alone
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.block_taker import BlockTaker
from evl_cache.extract.defaults import workers_for
from evl_cache.extract.doubts import DoubtCheck, check_doubts, has_older_frames, record_cleared
from evl_cache.extract.environment import package_versions
from evl_cache.extract.finished import found_finished
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.outages import OnOutage
from evl_cache.extract.redo import BlockRedo, failed_rows, rows_by_block
from evl_cache.extract.sources import SourceCheck, check_sources
from evl_cache.processes import Rendezvous
from evl_cache.spec import CODECS, MAP_STORAGE, SOFTWARE_PIXELS, TOKEN_STORAGE, CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import (
    BlockNotDone,
    FeatureCache,
    check_free_space,
    create_cache,
    finish_cache,
    finished_blocks,
)
from evl_cache.towers import Tower, check_layers, map_projections
from evl_cache.video.pool import DecodePool

SHARD_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What a run did.

    Attributes:
        clips: clips of the cache, whoever extracted them.
        clips_done_here: clips that this process extracted.
        failures: (clip id, reason) of each failed clip of the cache.
        seconds: duration of this run.
        cache_digest: digest of the finished cache.
        was_done: whether there was nothing to do.
        not_redone: why features that were to be made again stay as they are: of blocks, and of single clips.
        sources_changed: what is known of videos that are not those the features were made of.
        sources_in_doubt: what is not known of videos that may be others.
        clips_doubtful: clips that may have had other frames than they claim, of those examined for it; they were made
            again, but for those that `not_redone` names.
        clips_cleared: clips that were examined, and have the right frames.
        frames_untold: what is not known of frames, where clips were examined.
    """

    clips: int
    clips_done_here: int
    failures: tuple[tuple[str, str], ...]
    seconds: float
    cache_digest: str
    was_done: bool = False
    not_redone: tuple[str, ...] = ()
    sources_changed: str | None = None
    sources_in_doubt: str | None = None
    clips_doubtful: int = 0
    clips_cleared: int = 0
    frames_untold: str | None = None


@dataclass(frozen=True, kw_only=True)
class BlocksResult:
    """What a process did of the blocks of a cache.

    Attributes:
        clips: that it extracted.
        batch: samples of a forward pass, at the end.
        stayed: why a block stays as it is though it was to be redone, by block.
        kept_instead: why a clip's features stay though they were to be made again, by clip id.
    """

    clips: int
    batch: int
    stayed: Mapping[int, str]
    kept_instead: Mapping[str, str]

    @property
    def not_redone(self) -> tuple[str, ...]:
        """The reasons, for people."""
        kept = (
            f"the features of {clip} stay as they are ({reason_alone(reason, clip)})"
            for clip, reason in self.kept_instead.items()
        )
        return (*self.stayed.values(), *kept)


def make_spec(
    clips: ClipList,
    *,
    dataset: str,
    split: str,
    tower: TowerSpec,
    layers: Sequence[int],
    views: ViewSpec,
    tokens: str = TOKEN_STORAGE[0],
    maps: str = MAP_STORAGE[0],
    codec: str = CODECS[0],
    compute_dtype: str = "float32",
    pixels: str = SOFTWARE_PIXELS,
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
        pixels=pixels,
    )


def extract(
    job: ExtractionJob,
    *,
    options: ExtractOptions,
    on_clip: OnClip = lambda failed: None,
    on_bottleneck: OnBottleneck = lambda name: None,
    on_outage: OnOutage = lambda message: None,
    rendezvous: Rendezvous | None = None,
) -> ExtractResult:
    """Extract every clip that is not in the cache yet; run again after a kill, it goes on.

    Args:
        on_clip: called with whether it failed, after each clip, also for those found done.
        on_bottleneck: called with what the run waits for most: `decoding`, `transfer`, `device` or `writing`.
        on_outage: called with a line when a disk, say, is away, and with one when it is back; from any thread.
        rendezvous: shared by the processes of one run, which then try no block twice; None for a process that
            goes by the locks alone.

    Raises: UsageError where another cache is there; CacheError where the disk refuses; Outage where the videos cannot be
        read, and no clip is to blame; TooManyFailures.
    """
    started = time.monotonic()
    check_free_space(job.cache_path, job.spec)
    create_cache(
        job.cache_path,
        job.spec,
        job.clips.clips,
        origin=job.origin,
        created_with=package_versions(),
        projections=tower_projections(job.tower, job.spec),
        lock_expiry_s=options.lock_expiry_s,
    )
    done_here, not_redone = 0, list[str]()
    sources, doubts = _examine(job, options)
    redo = _redo_of(job, sources, doubts, options)
    if not redo and (finished := found_finished(job)) is not None:
        return _nothing_to_do(finished, sources, doubts, on_clip, started)
    was_done = not redo and len(finished_blocks(job.cache_path)) == job.spec.num_blocks
    while True:
        did = extract_blocks(
            job,
            range(job.spec.num_blocks),
            redo=redo,
            options=options,
            on_clip=on_clip,
            on_bottleneck=on_bottleneck,
            on_outage=on_outage,
            rendezvous=rendezvous,
        )
        done_here, not_redone = done_here + did.clips, [*not_redone, *did.not_redone]
        record_cleared(job.cache_path, job.spec, doubts.cleared, lock_expiry_s=options.lock_expiry_s)
        try:
            cache_digest = finish_cache(
                job.cache_path, job.spec, keeps_manifest=True, lock_expiry_s=options.lock_expiry_s
            )
            break
        except (BlockNotDone, CacheDamaged) as error:
            if did.stayed:  # a block that has no intact mark, and whose features cannot all be made again
                raise CacheError("; ".join(not_redone)) from error
            if not isinstance(error, BlockNotDone):
                raise
            redo = {}  # a job that had been paused withdrew a block meanwhile: extract what is missing
    return ExtractResult(
        clips=job.spec.num_clips,
        clips_done_here=done_here,
        failures=tuple(FeatureCache(job.cache_path).failures),
        seconds=time.monotonic() - started,
        cache_digest=cache_digest,
        was_done=was_done,
        not_redone=tuple(not_redone),
        sources_changed=None if options.check_sources else sources.told_of_changed,
        sources_in_doubt=sources.told_of_unproved,
        clips_doubtful=len(doubts.doubtful),
        clips_cleared=len(doubts.cleared),
        frames_untold=doubts.told_of_untold,
    )


def _nothing_to_do(
    cache: FeatureCache, sources: SourceCheck, doubts: DoubtCheck, on_clip: OnClip, started: float
) -> ExtractResult:
    """Return the result of a run that found everything done."""
    failures = tuple(cache.failures)
    for row in range(cache.spec.num_clips):
        on_clip(row < len(failures))
    return ExtractResult(
        clips=cache.spec.num_clips,
        clips_done_here=0,
        failures=failures,
        seconds=time.monotonic() - started,
        cache_digest=cache.fingerprint,
        was_done=True,
        sources_changed=sources.told_of_changed,
        sources_in_doubt=sources.told_of_unproved,
        clips_cleared=len(doubts.cleared),
        frames_untold=doubts.told_of_untold,
    )


def _examine(job: ExtractionJob, options: ExtractOptions) -> tuple[SourceCheck, DoubtCheck]:
    """What became of the videos of clips that are done, and where it was asked for, whether they have the right frames."""
    is_asked = options.retry_doubtful and has_older_frames(job.cache_path, job.spec)
    place = (job.cache_path, job.spec, job.clips.clips, job.root)
    sources = check_sources(*place, prove=options.check_sources or is_asked)
    if not is_asked:
        return sources, DoubtCheck()
    threads = workers_for(options, job.spec).decoding
    with DecodePool(threads, options=options.decoding, timeout_s=options.clip_timeout_s) as pool:
        return sources, check_doubts(*place, sources=sources, doubt=pool.doubt, threads=threads)


def _redo_of(
    job: ExtractionJob, sources: SourceCheck, doubts: DoubtCheck, options: ExtractOptions
) -> dict[int, BlockRedo]:
    """Which clips that are done are made again, by block."""
    rows = [
        *doubts.doubtful,
        *(failed_rows(job) if options.retry_failed else ()),
        *(sources.changed if options.check_sources else ()),
    ]
    return {block: BlockRedo(again=again) for block, again in rows_by_block(job.spec, rows).items()}


def tower_projections(tower: Tower, spec: CacheSpec) -> dict[int, MapProjection] | None:
    """What a cache that recomputes maps keeps of its tower; None for others."""
    if not spec.recomputes_maps:
        return None
    return map_projections(tower.visual, spec.layers, compute_dtype=getattr(torch, spec.compute_dtype))


def extract_blocks(
    job: ExtractionJob,
    blocks: Collection[int],
    *,
    redo: Mapping[int, BlockRedo],
    options: ExtractOptions,
    on_clip: OnClip,
    on_bottleneck: OnBottleneck = lambda name: None,
    on_outage: OnOutage = lambda message: None,
    rendezvous: Rendezvous | None = None,
) -> BlocksResult:
    """Extract the blocks that are not done or are in `redo`; the cache's description is there already.

    Returns: what this process did; other jobs may have done others meanwhile.
    Raises: CacheError where the disk refuses; UsageError for a decoder whose pixels are not the cache's; Outage and
        TooManyFailures as `extract`.
    """
    job.check_pixels(options.decoding)
    extractor = BlockExtractor(
        job, options=options, on_clip=on_clip, on_bottleneck=on_bottleneck, on_outage=on_outage
    )
    with closing(extractor):
        taker = BlockTaker(
            job,
            extractor,
            options=options,
            redo=redo,
            on_clip=on_clip,
            next_number=_block_numbers(rendezvous, job.spec),
        )
        clips = taker.run(blocks)
    return BlocksResult(
        clips=clips, batch=extractor.batch, stayed=taker.stayed, kept_instead=extractor.kept_instead
    )


def _block_numbers(rendezvous: Rendezvous | None, spec: CacheSpec) -> Callable[[], int | None]:
    """What gives each number to one process of a run only; None each time where there is no rendezvous."""
    if rendezvous is None:
        return lambda: None
    name = digest(spec.to_json())
    return lambda: rendezvous.next(name)
