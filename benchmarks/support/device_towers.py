"""Image towers with random weights, and extraction by them from frames in memory or from rendered videos."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.support.device_place import Place
from benchmarks.support.device_runner import is_there
from evl_cache.clips import Clip, ClipList
from evl_cache.extract import stage
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.prepare import PreparedClip
from evl_cache.spec import ViewSpec
from evl_cache.store import ClipRecord
from evl_cache.towers import Backbone, Tower, adapter_of, build_tower

_TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class MeasuredTower:
    """A tower on the device.

    Attributes:
        name: of the model, or of the one in its place.
        tower: module and spec.
        backbone: of its last layers, with maps.
        width: channels.
    """

    name: str
    tower: Tower
    backbone: Backbone
    width: int

    @property
    def visual(self) -> nn.Module:
        """The module."""
        return self.tower.visual

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are kept."""
        return self.backbone.layers

    def class_tokens(self, frames: Tensor) -> Tensor:
        """Return the last layer's class tokens (S, C) of frames (S, 3, H, W), with gradients where they are on."""
        adapter = adapter_of(self.visual)
        last = adapter.num_layers
        return adapter.tokens(frames.to(adapter.dtype), (last,), None)[last][:, 0]


def model_of(place: Place, names: tuple[str, str]) -> str:
    """The name of a model as `--model` takes it: the first one, or the second where open_clip is not there."""
    wanted, other = names
    if not is_there("open_clip"):
        return other
    if wanted != "tiny":
        return wanted
    path = place.scratch / "tiny.json"
    path.write_text(json.dumps(_TINY))
    return str(path)


def image_tower(place: Place, names: tuple[str, str], *, dtype: torch.dtype) -> MeasuredTower:
    """A tower on the device, in a dtype."""
    tower = build_tower(model_of(place, names), "none")
    depth = tower.spec.blocks
    layers = range(depth - place.sizes.tower_layers + 1, depth + 1)
    visual = tower.visual.to(place.device, dtype)
    return MeasuredTower(
        name=tower.spec.model, tower=tower, backbone=Backbone(visual, tuple(layers)), width=tower.spec.width
    )


def random_frames(place: Place, tower: MeasuredTower, batch: int, dtype: torch.dtype) -> Tensor:
    """Frames (B, T, 3, S, S) on the device."""
    side = tower.tower.spec.image_size
    return torch.randn(batch, place.sizes.frames, 3, side, side, device=place.device, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction came to.

    Attributes:
        clips: that have features.
        seconds: that it took.
        digest: of the cache.
        stages: seconds that the thread which drives the device spent on each.
    """

    clips: int
    seconds: float
    digest: str
    stages: dict[str, float]


def extraction_job(
    tower: Tower,
    cache: Path,
    clips: ClipList,
    *,
    root: Path,
    views: ViewSpec,
    layers: Sequence[int],
    dtype: str,
) -> ExtractionJob:
    """A job with maps and int8 rows."""
    spec = stage.make_spec(
        clips,
        dataset="generated",
        split="train",
        tower=tower.spec,
        layers=tuple(layers),
        views=views,
        compute_dtype=dtype,
    )
    return ExtractionJob(clips=clips, root=root, cache_path=cache, spec=spec, tower=tower)


def extract_frames(
    place: Place, tower: MeasuredTower, cache: Path, frames: Tensor, *, clips: int, dtype: str, batch: int
) -> Extraction:
    """Extract clips whose decoded frames (K, T, 3, S, S) are in memory; clip i has those of i modulo K."""
    listed = tuple(Clip(id=f"{i:05d}", path=f"{i:05d}.mp4", label=i % 2, split="train") for i in range(clips))
    job = extraction_job(
        tower.tower,
        cache,
        ClipList(clips=listed, classes=("a", "b"), source="generated"),
        root=cache.parent,
        views=ViewSpec(frames=frames.shape[1]),
        layers=tower.layers,
        dtype=dtype,
    )

    def prepare(extractor: BlockExtractor, row: int) -> PreparedClip:
        return PreparedClip(record=ClipRecord(id=listed[row].id), samples=frames[row % len(frames)][None])

    with mock.patch.object(BlockExtractor, "_prepare", prepare):
        return extracted(job, ExtractOptions(device=place.device, batch=batch))


def extracted(job: ExtractionJob, options: ExtractOptions) -> Extraction:
    """Run an extraction into a new cache."""
    shutil.rmtree(job.cache_path, ignore_errors=True)
    with _extractors() as made:
        result = stage.extract(job, options=options)
    stages: dict[str, float] = {}
    for extractor in made:
        for name, seconds in extractor.waited.seconds.items():
            stages[name] = stages.get(name, 0.0) + seconds
    return Extraction(
        clips=result.clips - len(result.failures),
        seconds=result.seconds,
        digest=result.cache_digest,
        stages={name: round(seconds, 3) for name, seconds in stages.items()},
    )


@contextmanager
def _extractors() -> Iterator[list[BlockExtractor]]:
    """Note the extractors that are made: they know where their time went."""
    made: list[BlockExtractor] = []
    begin = BlockExtractor.__init__

    def noting(extractor: BlockExtractor, *arguments: Any, **options: Any) -> None:
        begin(extractor, *arguments, **options)
        made.append(extractor)

    with mock.patch.object(BlockExtractor, "__init__", noting):
        yield made


def frames_in_memory(place: Place, tower: MeasuredTower, count: int) -> Tensor:
    """Decoded frames, float32 (K, T, 3, S, S), as decoding gives them."""
    side = tower.tower.spec.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, place.sizes.frames, 3, side, side, generator=generator)
