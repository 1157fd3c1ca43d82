"""Extraction on a device, from frames in memory or from videos: how long it took, and its thread at which stage."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.support.device_place import Place
from benchmarks.support.device_towers import MeasuredTower
from benchmarks.support.memory_extraction import frames_at_hand, noted_extractors, seconds_by_stage
from benchmarks.support.stored_features import clip_list
from evl_cache.clips import Clip, ClipList
from evl_cache.extract import stage
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.spec import ViewSpec
from evl_cache.towers import Tower

LONG = 128  # frames of a video as data sets have them
_FILMS = 3  # distinct ones


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
    job = job_of_frames(tower, cache, clips=clips, dtype=dtype, frames=frames.shape[1])
    with frames_at_hand(frames):
        return extracted(job, ExtractOptions(device=place.device, batch=batch))


def job_of_frames(tower: MeasuredTower, cache: Path, *, clips: int, dtype: str, frames: int) -> ExtractionJob:
    """Return a job over clips that have no files, each with one view of so many frames."""
    return extraction_job(
        tower.tower,
        cache,
        clip_list(clips),
        root=cache.parent,
        views=ViewSpec(frames=frames),
        layers=tower.layers,
        dtype=dtype,
    )


def extracted(job: ExtractionJob, options: ExtractOptions) -> Extraction:
    """Run an extraction into a new cache."""
    shutil.rmtree(job.cache_path, ignore_errors=True)
    with noted_extractors() as made:
        result = stage.extract(job, options=options)
    return Extraction(
        clips=result.clips - len(result.failures),
        seconds=result.seconds,
        digest=result.cache_digest,
        stages=seconds_by_stage(made),
    )


def frames_in_memory(place: Place, tower: MeasuredTower, count: int) -> Tensor:
    """Decoded frames, float32 (K, T, 3, S, S), as decoding gives them."""
    side = tower.tower.spec.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, place.sizes.frames, 3, side, side, generator=generator)


def _films(folder: Path, count: int, frames: int) -> list[Path]:
    if frames >= LONG:
        from benchmarks.long_clips import render_clips

        return render_clips(folder, count=count, num_frames=frames)
    from evl_cache.rendered import DEMO_CLASSES, demo_motion_frames, write_video

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        write_video(path, demo_motion_frames(DEMO_CLASSES[number], 0, seed=0))
    return paths


def generated_videos(folder: Path, *, count: int, frames: int) -> ClipList:
    """H.264 files: a few are rendered, and stand under many names. Short ones are small, too."""
    films = _films(folder / "films", min(_FILMS, count), frames)
    clips = []
    for number in range(count):
        name = f"{number:04d}.mp4"
        if not (folder / name).exists():
            os.link(films[number % len(films)], folder / name)
        clips.append(Clip(id=name, path=name, label=number % 2, split="train"))
    return ClipList(clips=tuple(clips), classes=("a", "b"), source="generated")
