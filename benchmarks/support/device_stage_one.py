"""Stage one on a device: the tower's bare forward pass, extraction from frames in memory, and from videos, by stage.

Processes and threads beside the device are those that `extract` takes where nobody says.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.support.device_place import Place, seconds_of
from benchmarks.support.device_runner import Clock, Measurement, Values
from benchmarks.support.device_towers import MeasuredTower, image_tower, random_frames

_FRAMES_HELD = 64  # clips whose frames are in memory
EXTRACTING = ("timm", "numcodecs", "awscrt", "av")
DTYPE = "float16"


def measurements(place: Place) -> list[Measurement]:
    """Everything that is measured of stage one, in order."""
    towers = place.sizes.towers
    measured = [
        Measurement(name=f"bare.{names[0]}", call=_of_bare(place, names), seconds=20, needs=("timm",))
        for names in towers
    ]
    measured += [
        Measurement(name=f"ours.{names[0]}", call=_of_ours(place, names), seconds=40, needs=EXTRACTING)
        for names in towers
    ]
    return [
        *measured,
        Measurement(
            name=f"written.{towers[0][0]}",
            call=lambda clock: _written(place, towers[0], clock),
            seconds=30,
            needs=EXTRACTING,
        ),
        Measurement(
            name=f"decoded.{towers[0][0]}",
            call=lambda clock: _decoded(place, towers[0], clock),
            seconds=60,
            needs=EXTRACTING,
        ),
    ]


def _of_bare(place: Place, names: tuple[str, str]) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _bare(place, names, clock)


def _of_ours(place: Place, names: tuple[str, str]) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _ours(place, names, clock)


def _dtype(place: Place) -> str:
    """What towers compute in; on a CPU few kernels know float16."""
    return DTYPE if place.is_gpu else "float32"


def _tower(place: Place, names: tuple[str, str]) -> MeasuredTower:
    return image_tower(place, names, dtype=getattr(torch, _dtype(place)))


@torch.no_grad()
def bare_rate(place: Place, tower: MeasuredTower, clock: Clock) -> float:
    """Clips a second of the tower's own forward pass, frames on the device."""
    frames = random_frames(place, tower, place.sizes.tower_batch, getattr(torch, _dtype(place)))
    flat = frames.flatten(0, 1)
    seconds_of(lambda: tower.visual(flat), place)
    seconds_of(lambda: tower.visual(flat), place)
    took: list[float] = []
    while len(took) < 3 or (len(took) < place.sizes.rounds and clock.left_s > 5 * sum(took)):
        took.append(seconds_of(lambda: tower.visual(flat), place))
    return len(frames) / sorted(took)[len(took) // 2]


def _bare(place: Place, names: tuple[str, str], clock: Clock) -> Iterator[Values]:
    tower = _tower(place, names)
    yield {"model": tower.name, "dtype": _dtype(place), "batch": place.sizes.tower_batch}
    yield {"clips_per_s": round(bare_rate(place, tower, clock), 2)}
    frames = random_frames(place, tower, place.sizes.tower_batch, getattr(torch, _dtype(place)))
    seconds_of(lambda: tower.backbone(frames), place)
    took = sorted(seconds_of(lambda: tower.backbone(frames), place) for _ in range(3))[1]
    yield {"clips_per_s_with_tokens_and_maps": round(len(frames) / took, 2)}


def _ours(place: Place, names: tuple[str, str], clock: Clock) -> Iterator[Values]:
    """Extraction with maps, rows and the store, from frames in memory; the bare pass before and after it."""
    from benchmarks.support.device_extraction import Extraction, extract_frames, frames_in_memory

    tower = _tower(place, names)
    before = bare_rate(place, tower, Clock(deadline=time.monotonic() + 5))
    frames = frames_in_memory(place, tower, min(_FRAMES_HELD, place.sizes.clips))
    batch, cache = place.sizes.tower_batch, place.scratch / "stage-one"
    extract_frames(
        place, tower, cache, frames, clips=batch, dtype=_dtype(place), batch=batch
    )  # libraries are loaded
    found: Extraction | None = None
    for clips in (place.sizes.clips // 2, 2 * place.sizes.clips, 4 * place.sizes.clips):
        if found is not None and clock.left_s < 6 * found.seconds:
            break
        found = extract_frames(place, tower, cache, frames, clips=clips, dtype=_dtype(place), batch=batch)
        rate = found.clips / found.seconds
        yield {
            "model": tower.name,
            "dtype": _dtype(place),
            "batch": batch,
            "processors": len(os.sched_getaffinity(0)),
            "clips": found.clips,
            "clips_per_s": round(rate, 2),
            "seconds_by_stage": found.stages,
            "bare_clips_per_s": round(before, 2),
            "share_of_bare_forward": round(rate / before, 4),
        }
    after = bare_rate(place, tower, Clock(deadline=time.monotonic() + 2))
    yield {"bare_clips_per_s_after": round(after, 2)}
    shutil.rmtree(cache)


def _written(place: Place, names: tuple[str, str], clock: Clock) -> Iterator[Values]:
    """Samples a second with a stub in the tower's place, whose features are on the device: what a process can write."""
    from benchmarks.support.device_extraction import (
        Extraction,
        extract_frames,
        frames_in_memory,
        job_of_frames,
    )
    from benchmarks.support.memory_extraction import StubTower

    tower, cache = _tower(place, names), place.scratch / "stage-one-written"
    frames = frames_in_memory(place, tower, 1)
    batch, shape = place.sizes.tower_batch, {"dtype": _dtype(place), "frames": place.sizes.frames}
    stub = StubTower(job_of_frames(tower, cache, clips=1, **shape).spec, place.device)
    stub.prepare(batch)
    found: Extraction | None = None
    with stub.in_use():
        for clips in (place.sizes.clips // 2, 2 * place.sizes.clips, 4 * place.sizes.clips):
            if found is not None and clock.left_s < 6 * found.seconds:
                break
            found = extract_frames(place, tower, cache, frames, clips=clips, dtype=_dtype(place), batch=batch)
            yield {
                "shapes_of": tower.name,
                "dtype": _dtype(place),
                "batch": batch,
                "clips": found.clips,
                "samples_per_s_written": round(found.clips / found.seconds, 2),
                "seconds_by_stage": found.stages,
            }
    shutil.rmtree(cache)


def _decoded(place: Place, names: tuple[str, str], clock: Clock) -> Iterator[Values]:
    """Extraction from generated videos."""
    from benchmarks.support.device_extraction import LONG, extracted, extraction_job, generated_videos
    from evl_cache.extract.job import ExtractOptions
    from evl_cache.spec import ViewSpec

    count, frames = place.sizes.videos
    folder = place.scratch / "videos"
    started = time.monotonic()
    clips = generated_videos(folder, count=count, frames=frames)
    yield {"rendering_s": round(time.monotonic() - started, 1), "videos": count, "frames_of_a_video": frames}
    tower = _tower(place, names)
    views = ViewSpec(frames=place.sizes.frames, stride=16 if frames >= LONG else 1)
    job = extraction_job(
        tower.tower,
        place.scratch / "stage-one-decoded",
        clips,
        root=folder,
        views=views,
        layers=tower.layers,
        dtype=_dtype(place),
    )
    options = ExtractOptions(device=place.device, batch=place.sizes.tower_batch)
    found = extracted(job, options)
    rate = found.clips / found.seconds
    yield {
        "model": tower.name,
        "processors": len(os.sched_getaffinity(0)),
        "clips": found.clips,
        "clips_per_s": round(rate, 2),
        "seconds_by_stage": found.stages,
    }
    bare = bare_rate(place, tower, Clock(deadline=time.monotonic() + 5))
    yield {"bare_clips_per_s": round(bare, 2), "share_of_bare_forward": round(rate / bare, 4)}
