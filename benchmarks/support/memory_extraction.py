"""Stage one from decoded frames that are in memory, with a tower or with a stub that costs nothing.

B samples of a batch, T frames, S the tower's image size, P patches, C channels, K of them distinct.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.outlier_features import outlier_features, softmax_maps
from benchmarks.support.stored_features import VIT_B_16, clip_list
from evl_cache.extract import block, stage
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.device_pipeline import DevicePipeline
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.prepare import PreparedClip
from evl_cache.processes import Rendezvous
from evl_cache.spec import CacheSpec, TowerSpec, ViewSpec
from evl_cache.store import ClipRecord, create_cache
from evl_cache.towers import Features, Tower

STORED_LAYERS = 5  # the last ones of a tower, or as many as there are
DISTINCT = 8  # clips whose frames or features are in memory; clip i has those of i modulo this


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a run over the blocks of a cache came to.

    Attributes:
        samples: that this process made.
        began_s, ended_s: by the computer's clock.
        processor_s: time of this process's threads on processors.
        stages: seconds that the thread which drives the device waited for each.
    """

    samples: int
    began_s: float
    ended_s: float
    processor_s: float
    stages: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


class StubTower:
    """Takes the place of `Backbone`: gives features that were made once, whatever the frames, at once.

    Args:
        spec: their shapes.
        device: where they are.

    Attributes:
        visual: in the place of the tower's module.
        asked: samples of each batch that it was asked for.
    """

    def __init__(self, spec: CacheSpec, device: str, *, distinct: int = DISTINCT) -> None:
        shape = {"clips": distinct, "frames": spec.views.frames, "patches": spec.num_tokens - 1}
        layers, dtype = len(spec.stored_layers), getattr(torch, spec.compute_dtype)
        tokens = outlier_features(**shape, channels=spec.tower.width, layers=layers, seed=0).tokens
        maps = softmax_maps(**shape, layers=len(spec.layers), seed=0) if spec.stores_maps else None
        self._spec, self.visual = spec, nn.Identity()
        self._tokens = [layer.to(device, dtype, copy=True) for layer in tokens.unbind(1)]
        self._maps = [] if maps is None else [layer.to(device, dtype, copy=True) for layer in maps.unbind(1)]
        self._of_batch: dict[int, Features] = {}
        self.asked: list[int] = []

    def prepare(self, batch: int) -> None:
        """Make the features of a batch, so that asking for them takes no time."""
        if batch not in self._of_batch:
            rows = torch.arange(batch) % len(self._tokens[0])
            if batch == len(self._tokens[0]):
                tokens, maps = self._tokens, self._maps
            else:
                tokens, maps = (
                    [layer[rows.to(layer.device)] for layer in of] for of in (self._tokens, self._maps)
                )
            self._of_batch[batch] = Features(
                tokens=dict(zip(self._spec.stored_layers, tokens, strict=True)),
                maps=dict(zip(self._spec.layers, maps, strict=True)) if maps else {},
            )

    def __call__(self, frames: Tensor) -> Features:
        """Return the features of a batch (B, T, 3, S, S)."""
        self.asked.append(len(frames))
        self.prepare(len(frames))
        return self._of_batch[len(frames)]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have every extraction ask this instead of its tower."""
        with mock.patch.object(block, "Backbone", return_value=self):
            yield


@contextmanager
def frames_at_hand(frames: Tensor) -> Iterator[None]:
    """Have every extraction take these decoded frames (K, T, 3, S, S): clip i those of i modulo K."""

    def prepare(_: BlockExtractor, rows: Sequence[int]) -> list[PreparedClip]:
        return [
            PreparedClip(record=ClipRecord(id=f"{row:05d}"), samples=frames[row % len(frames)][None])
            for row in rows
        ]

    with mock.patch.object(BlockExtractor, "_prepare", prepare):
        yield


@contextmanager
def one_thing_at_a_time() -> Iterator[None]:
    """Have every extraction make the rows of a batch before the next one runs, while nothing else is on the device."""
    start = DevicePipeline._start

    def alone(pipeline: DevicePipeline, *arguments: Any) -> Any:
        pipeline.makes_rows_beside = False
        started = start(pipeline, *arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return started

    with mock.patch.object(DevicePipeline, "_start", alone):
        yield


@contextmanager
def noted_extractors() -> Iterator[list[BlockExtractor]]:
    """Note the extractors that are made: they know where their time went."""
    made: list[BlockExtractor] = []
    begin = BlockExtractor.__init__

    def noting(extractor: BlockExtractor, *arguments: Any, **options: Any) -> None:
        begin(extractor, *arguments, **options)
        made.append(extractor)

    with mock.patch.object(BlockExtractor, "__init__", noting):
        yield made


def seconds_by_stage(extractors: list[BlockExtractor]) -> dict[str, float]:
    """Seconds that threads which drive a device waited for each stage."""
    stages: dict[str, float] = {}
    for extractor in extractors:
        for name, seconds in extractor.waited.seconds.items():
            stages[name] = round(stages.get(name, 0.0) + seconds, 3)
    return stages


def frames_of(tower: TowerSpec, *, frames: int = 8, distinct: int = DISTINCT) -> Tensor:
    """Decoded frames, float32 (K, T, 3, S, S), as decoding gives them."""
    side = tower.image_size
    return torch.randn(distinct, frames, 3, side, side, generator=torch.Generator().manual_seed(0))


def memory_job(
    cache: Path,
    *,
    tower: Tower | None = None,
    clips: int,
    block_clips: int = stage.SHARD_SAMPLES,
    codec: str = "default",
    compute_dtype: str = "float32",
) -> ExtractionJob:
    """Return a job over clips without files: one view of 8 frames, the tower's last layers, with maps and int8 rows.

    Args:
        tower: None for that of a stub, of ViT-B/16's shapes.
    """
    tower = tower or Tower(visual=nn.Identity(), spec=VIT_B_16)
    listed, last = clip_list(clips), tower.spec.blocks
    layers = tuple(range(max(1, last - STORED_LAYERS + 1), last + 1))
    spec = stage.make_spec(
        listed, dataset="generated", split="train", tower=tower.spec, layers=layers, views=ViewSpec(),
        codec=codec, compute_dtype=compute_dtype,
    )  # fmt: skip
    spec = replace(spec, block_clips=block_clips)
    return ExtractionJob(clips=listed, root=cache.parent, cache_path=cache, spec=spec, tower=tower)


def begin(job: ExtractionJob) -> None:
    """Begin a new cache in the place of one that may be there."""
    shutil.rmtree(job.cache_path, ignore_errors=True)
    create_cache(job.cache_path, job.spec, job.clips.clips, origin={}, created_with={})


def blocks_written(
    job: ExtractionJob,
    options: ExtractOptions,
    *,
    rendezvous: Rendezvous | None = None,
    after: Callable[[], None] = lambda: None,
) -> Written:
    """Extract the blocks of a cache that is begun, as `extract` does: locks, shards, fsync, marks.

    Args:
        after: waits for a device, say.
    """
    with noted_extractors() as made:
        began, processor = time.time(), time.process_time()
        found = stage.extract_blocks(
            job,
            range(job.spec.num_blocks),
            redo={},
            options=options,
            on_clip=lambda failed: None,
            rendezvous=rendezvous,
        )
        after()
        ended, processor = time.time(), time.process_time() - processor
    return Written(
        samples=found.clips * job.spec.views.per_clip,
        began_s=began,
        ended_s=ended,
        processor_s=processor,
        stages=seconds_by_stage(made),
    )
