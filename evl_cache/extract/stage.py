"""Stage one: the frozen tower runs once per clip, and its features are written for good.

Blocks are taken one after another. Each is decoded, run, quantised, compressed and committed whole. Whoever takes a
block writes the same bytes, because its batches follow from the block alone.
"""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from evl_cache.attention_maps import MapProjection
from evl_cache.canonical_json import digest
from evl_cache.clips import ClipList
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.block_taker import BlockTaker, blocks_with_failures
from evl_cache.extract.environment import package_versions
from evl_cache.extract.job import ExtractionJob, ExtractOptions, OnBottleneck, OnClip
from evl_cache.extract.outages import OnOutage
from evl_cache.processes import Rendezvous
from evl_cache.spec import CODECS, MAP_STORAGE, SOFTWARE_PIXELS, TOKEN_STORAGE, CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import BlockNotDone, FeatureCache, check_free_space, create_cache, finish_cache
from evl_cache.towers import Tower, check_layers, map_projections

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
    """

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
    done_here, redo = 0, blocks_with_failures(job) if options.retry_failed else set()
    while True:
        done_here += extract_blocks(
            job,
            range(job.spec.num_blocks),
            redo=redo,
            options=options,
            on_clip=on_clip,
            on_bottleneck=on_bottleneck,
            on_outage=on_outage,
            rendezvous=rendezvous,
        )
        try:
            cache_digest = finish_cache(job.cache_path, job.spec, lock_expiry_s=options.lock_expiry_s)
            break
        except BlockNotDone:  # a job that had been paused withdrew a block meanwhile: extract what is missing
            redo = set()
    return ExtractResult(
        clips=job.spec.num_clips,
        clips_done_here=done_here,
        failures=tuple(FeatureCache(job.cache_path).failures),
        seconds=time.monotonic() - started,
        cache_digest=cache_digest,
    )


def tower_projections(tower: Tower, spec: CacheSpec) -> dict[int, MapProjection] | None:
    """What a cache that recomputes maps keeps of its tower; None for others."""
    if not spec.recomputes_maps:
        return None
    return map_projections(tower.visual, spec.layers, compute_dtype=getattr(torch, spec.compute_dtype))


def extract_blocks(
    job: ExtractionJob,
    blocks: Collection[int],
    *,
    redo: Collection[int],
    options: ExtractOptions,
    on_clip: OnClip,
    on_bottleneck: OnBottleneck = lambda name: None,
    on_outage: OnOutage = lambda message: None,
    rendezvous: Rendezvous | None = None,
) -> int:
    """Extract the blocks that are not done or are in `redo`; the cache's description is there already.

    Returns: clips done by this process; others may have been done by other jobs meanwhile.
    Raises: CacheError where the disk refuses; UsageError for a decoder whose pixels are not the cache's; Outage and
        TooManyFailures as `extract`.
    """

    def on_own_clip(failed: bool) -> None:
        on_clip(failed)
        taker.look_around_at_times()  # so that a progress line counts the clips of all jobs

    job.check_pixels(options.decoding)
    extractor = BlockExtractor(
        job, options=options, on_clip=on_own_clip, on_bottleneck=on_bottleneck, on_outage=on_outage
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
        return taker.run(blocks)


def _block_numbers(rendezvous: Rendezvous | None, spec: CacheSpec) -> Callable[[], int | None]:
    """What gives each number to one process of a run only; None each time where there is no rendezvous."""
    if rendezvous is None:
        return lambda: None
    name = digest(spec.to_json())
    return lambda: rendezvous.next(name)
