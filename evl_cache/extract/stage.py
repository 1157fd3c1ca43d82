"""Stage one: the frozen tower runs once per clip, and what it gives is written for good.

Blocks are taken one after another; each is decoded, run, quantised, compressed and committed whole. Whoever
takes a block writes the same bytes: batches are a fixed function of the block.
"""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evl_cache.attention_maps import MapProjection
from evl_cache.canonical_json import digest
from evl_cache.clips import Clip, ClipList
from evl_cache.errors import UsageError
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.block_taker import BlockTaker, blocks_with_failures
from evl_cache.extract.block_taker import OnClip as OnClip
from evl_cache.extract.environment import package_versions
from evl_cache.extract.failure_limit import FailureLimit
from evl_cache.processes import Rendezvous
from evl_cache.spec import SOFTWARE_PIXELS, CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import BlockNotDone, FeatureCache, check_free_space, create_cache, finish_cache
from evl_cache.towers import Tower, check_layers, map_projections
from evl_cache.video import DecodeOptions
from evl_cache.video.pool import DEFAULT_TIMEOUT_S

SHARD_SAMPLES = 64

OnBottleneck = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How to extract; what is extracted is in the spec.

    Attributes:
        device: of the forward pass.
        batch: samples of one forward pass; part of what makes bytes identical.
        decode_workers: processes that decode.
        retry_failed: redo the blocks that hold failed clips.
        reuse: a cache whose rows of equal features and sources are copied.
        decoding: which decoder, and what of damaged frames; which decoder served a clip is in its mark.
        clip_timeout_s: of decoding one clip.
        most_failures: how many clips may fail before the run is stopped; looked at after each block.
        lock_expiry_s: see `store.locks`.
    """

    device: str = "cpu"
    batch: int = 8
    decode_workers: int = 2
    retry_failed: bool = False
    reuse: Path | None = None
    decoding: DecodeOptions = field(default_factory=DecodeOptions)
    clip_timeout_s: float = DEFAULT_TIMEOUT_S
    most_failures: FailureLimit | None = None
    lock_expiry_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("batch", "decode_workers"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.clip_timeout_s <= 0:
            raise UsageError(f"clip_timeout_s is {self.clip_timeout_s}; expected more than 0 seconds")


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
    clips: ClipList,
    *,
    root: Path,
    cache: Path,
    spec: CacheSpec,
    tower: Tower,
    options: ExtractOptions,
    origin: dict[str, Any] | None = None,
    on_clip: OnClip = lambda failed: None,
    on_bottleneck: OnBottleneck = lambda name: None,
    rendezvous: Rendezvous | None = None,
) -> ExtractResult:
    """Extract every clip that is not in the cache yet; run again after a kill, it goes on.

    Args:
        root: what relative clip paths are relative to.
        origin: stored for `repair`.
        on_clip: called with whether it failed, after each clip, also for those found done.
        on_bottleneck: called with what the run waits for most: `decoding`, `transfer`, `device` or `writing`.
        rendezvous: of the processes of one run, which then try no block twice; None for one that goes by the locks.

    Raises: UsageError where another cache is there; CacheError where the disk refuses; TooManyFailures.
    """
    started = time.monotonic()
    check_free_space(cache, spec)
    versions = package_versions()
    create_cache(
        cache,
        spec,
        clips.clips,
        origin=origin or {},
        created_with=versions,
        projections=tower_projections(tower, spec),
        lock_expiry_s=options.lock_expiry_s,
    )
    redo, done_here, cache_digest = blocks_with_failures(cache, spec) if options.retry_failed else (), 0, ""
    while not cache_digest:
        done_here += extract_blocks(
            clips.clips,
            range(spec.num_blocks),
            redo=redo,
            root=root,
            cache=cache,
            spec=spec,
            tower=tower,
            options=options,
            on_clip=on_clip,
            on_bottleneck=on_bottleneck,
            rendezvous=rendezvous,
        )
        redo = ()
        with suppress(BlockNotDone):  # a writer that had been paused took a block back meanwhile: once more
            cache_digest = finish_cache(cache, spec, lock_expiry_s=options.lock_expiry_s)
    return ExtractResult(
        clips=spec.num_clips,
        clips_done_here=done_here,
        failures=tuple(FeatureCache(cache).failures),
        seconds=time.monotonic() - started,
        cache_digest=cache_digest,
    )


def tower_projections(tower: Tower, spec: CacheSpec) -> dict[int, MapProjection] | None:
    """What a cache that recomputes maps keeps of its tower; None for others."""
    if not spec.recomputes_maps:
        return None
    return map_projections(tower.visual, spec.layers, compute_dtype=getattr(torch, spec.compute_dtype))


def _numbers(rendezvous: Rendezvous | None, spec: CacheSpec) -> Callable[[], int | None]:
    if rendezvous is None:
        return lambda: None
    name = digest(spec.to_json())
    return lambda: rendezvous.next(name)


def extract_blocks(
    clips: Sequence[Clip],
    blocks: Collection[int],
    *,
    redo: Collection[int],
    root: Path,
    cache: Path,
    spec: CacheSpec,
    tower: Tower,
    options: ExtractOptions,
    on_clip: OnClip,
    on_bottleneck: OnBottleneck = lambda name: None,
    rendezvous: Rendezvous | None = None,
) -> int:
    """Extract the blocks that are not done or are in `redo`; the cache's description is there already.

    Returns: clips done by this process; others may have been done by other jobs meanwhile.
    Raises: CacheError where the disk refuses.
    """

    def on_own_clip(failed: bool) -> None:
        on_clip(failed)
        taker.look_around_at_times()  # so that a progress line is that of all jobs

    if options.decoding.pixels != spec.pixels:
        raise UsageError(
            f"{cache} holds features of {spec.pixels} pixels, --decoder {options.decoding.decoder} on "
            f"{options.decoding.device} gives {options.decoding.pixels}; use the same decoder, or another cache"
        )
    extractor = BlockExtractor(
        clips,
        root=root,
        cache=cache,
        spec=spec,
        tower=tower,
        device=options.device,
        batch=options.batch,
        workers=options.decode_workers,
        reuse=options.reuse,
        decoding=options.decoding,
        clip_timeout_s=options.clip_timeout_s,
        on_clip=on_own_clip,
        on_bottleneck=on_bottleneck,
    )
    with extractor:
        taker = BlockTaker(
            cache,
            spec,
            extractor,
            lock_expiry_s=options.lock_expiry_s,
            redo=redo,
            on_clip=on_clip,
            next_number=_numbers(rendezvous, spec),
            most_failures=options.most_failures,
        )
        return taker.run(blocks)
