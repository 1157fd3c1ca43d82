"""Whole trainings on a device from a cache of generated features, and a sweep of sixteen heads against sixteen runs."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks.support.device_caches import write_generated
from benchmarks.support.device_place import Place
from benchmarks.support.device_runner import Clock, Measurement, Skipped, Values
from evl_cache.runs import RunFile
from evl_cache.store import FeatureCache
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import SweepRun, expand
from evl_cache.train import TrainOptions, train

STORE = ("numcodecs", "awscrt")
KEPT = {"disk": None, "ram": "ram", "device": "device"}
_VAL_SAMPLES = 32
_MOST_EPOCHS = 6
_SPARE_S = 3.0  # before a training's time is over
_LEAST_STEPS = 4
_LAST = 16  # steps whose median tells the rate


def measurements(place: Place) -> list[Measurement]:
    """Everything that is measured of whole trainings, in order."""
    return [
        Measurement(name="cache", call=lambda clock: _written(place), seconds=60, needs=STORE),
        *(
            Measurement(name=f"train.{where}", call=_of_train(place, where), seconds=40, needs=STORE)
            for where in KEPT
        ),
        *_without_a_graph(place),
        Measurement(name="sweep", call=lambda clock: _sweep(place, clock), seconds=100, needs=STORE),
    ]


class _Enough(Exception):
    """There is no time for more steps."""


def _without_a_graph(place: Place) -> list[Measurement]:
    """The same with every operation started anew, where steps are recorded otherwise."""
    if "cuda_graph" not in {field.name for field in fields(TrainOptions)}:
        return []

    def call(clock: Clock) -> Iterator[Values]:
        return _train(place, "device", clock, cuda_graph=False)

    return [Measurement(name="train.device_without_graph", call=call, seconds=30, needs=STORE)]


def _of_train(place: Place, where: str) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _train(place, where, clock)


def _square(place: Place) -> Place:
    """The place with a square grid, as towers have."""
    side = min(place.sizes.grid)
    return replace(place, sizes=replace(place.sizes, grid=(side, side)))


def _written(place: Place) -> Iterator[Values]:
    started = time.monotonic()
    sizes = _square(place).sizes
    cache = write_generated(place.scratch / "train", sizes, samples=sizes.samples)
    took = time.monotonic() - started
    write_generated(place.scratch / "val", sizes, samples=min(_VAL_SAMPLES, sizes.samples), split="val")
    nbytes = sum(path.stat().st_size for path in (place.scratch / "train").rglob("*") if path.is_file())
    yield {
        "samples": sizes.samples,
        "samples_per_s_written": round(sizes.samples / took, 1),
        "mb_a_sample": round(nbytes / len(cache) / 1e6, 3),
    }


def _caches(place: Place) -> tuple[FeatureCache, FeatureCache]:
    paths = place.scratch / "train", place.scratch / "val"
    if not all((path / "manifest.json").is_file() for path in paths):
        raise Skipped("the generated cache was not written")
    return FeatureCache(paths[0]), FeatureCache(paths[1])


def _options(place: Place, **more: Any) -> TrainOptions:
    return TrainOptions(
        head=f"decoder{place.sizes.layers}",
        precision=place.half if place.is_gpu else "float32",
        device=place.device,
        **({"batch": place.sizes.train_batch} | more),
    )


def _train(place: Place, where: str, clock: Clock, **more: Any) -> Iterator[Values]:
    """Epochs of a training, as many as there is time for; the first one reads the disk and warms up."""
    caches, out = _caches(place), place.scratch / "-".join(["run", where, *more])
    times, waits = [time.monotonic()], list[str]()

    def on_step(done: int, total: int, loss: float) -> None:
        times.append(time.monotonic())
        if clock.left_s < _SPARE_S and len(times) > _LEAST_STEPS:
            raise _Enough

    epochs = _MOST_EPOCHS if place.is_gpu else 2
    options = _options(place, epochs=epochs, keep_in=KEPT[where], **more)
    with suppress(_Enough):
        train(*caches, options=options, out=out, on_step=on_step, on_bottleneck=waits.append)
    intervals = [after - before for before, after in itertools.pairwise(times)]
    rows = metrics(out)
    later = [row["clips_per_s"] for row in rows[1:]]
    yield {
        # Of whole epochs, with what begins and ends them.
        "clips_per_s": round(max(later), 1) if later else None,
        "clips_per_s_within_an_epoch": round(options.global_batch / statistics.median(intervals[-_LAST:]), 1),
        "clips_per_s_by_epoch": [round(row["clips_per_s"], 1) for row in rows],
        "waits_for": waits[-1],
        "waits_for_by_epoch": [row["bottleneck"] for row in rows],
        "batch": options.global_batch,
        "steps": len(intervals),
        "loss_by_epoch": [row["train_loss"] for row in rows],
        "files_were_read_before": True,  # just written, so the page cache has them
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines that a run keeps of its epochs."""
    lines = (run / RunFile.METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def sixteen(layers: int) -> list[dict[str, Any]]:
    """The grid of sixteen heads (fewer where the cache has few layers): decoders with their modules, and the others."""
    depths = [f"decoder{n}" for n in dict.fromkeys((layers, max(1, layers // 2), 1))]
    return [
        {"head": depths, "temporal": ["all", "none", "conv"]},
        {"head": depths[0], "temporal": "no-cross-attention"},
        {"head": ["linear", "meanpool", "attentive", "mlap", "uniformerv2", "ladder"]},
    ]


def _sweep(place: Place, clock: Clock) -> Iterator[Values]:
    """All heads in one pass, and then each alone, as many as there is time for."""
    caches = _caches(place)
    options = _options(place, epochs=2, batch=place.sizes.sweep_batch)
    common = {name: getattr(options, name) for name in ("epochs", "batch", "precision", "device")}
    runs = expand(sixteen(place.sizes.layers), {**common, "keep_in": "ram"})
    clips = range(min(place.sizes.sweep_samples, len(caches[0].clips)))
    started = time.monotonic()
    result = sweep(*caches, runs=runs, out=place.scratch / "sweep", train_clips=clips)
    swept = time.monotonic() - started
    done = [row.name for row in result.runs if row.status == "done"]
    yield {
        "heads": len(runs),
        "heads_done": len(done),
        "passes": len(result.passes),
        "seconds_of_sweep": round(swept, 2),
        "ms_per_step": {row.name: row.ms_per_step for row in result.runs},
    }
    alone: list[float] = []
    for run in _cheap_and_dear(runs):
        if alone and clock.left_s < 1.5 * max(alone):
            break
        started = time.monotonic()
        train(*caches, options=run.options, out=place.scratch / "alone" / run.name, train_clips=clips)
        alone.append(time.monotonic() - started)
        yield {
            "runs_alone": len(alone),
            "seconds_of_runs_alone": round(sum(alone), 2),
            # Of as many runs as there are heads, where not all were made.
            "sweep_vs_runs": round(swept / (sum(alone) / len(alone) * len(runs)), 4),
            "is_estimate": len(alone) < len(runs),
        }


def _cheap_and_dear(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs in an order of which any beginning is like the whole: from both ends in turn."""
    left, order = list(runs), []
    while left:
        order.append(left.pop(0 if len(order) % 2 == 0 else -1))
    return order
