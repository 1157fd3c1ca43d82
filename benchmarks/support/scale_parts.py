"""The parts of `benchmarks.scale`, each run in processes of its own: imported first, measured after."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.support.large_sizes import NUM_CLASSES, SIZES, clip_list, tower
from benchmarks.support.process_costs import costs_of, memory_mb
from benchmarks.support.stepped_processes import Steps, serve
from evl_cache.batches.epoch_order import EpochOrder
from evl_cache.caches.listing import list_caches
from evl_cache.clips import select
from evl_cache.datasets.list_file import read_lists
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.stage import extract
from evl_cache.store import FeatureCache, finish_cache, read_clips, read_description
from evl_cache.store.format.description import clips_lines
from evl_cache.train import TrainOptions, train

Found = Iterator[Mapping[str, Any]]
_BATCH = 16


class _FirstStep(Exception):
    """The first batch has been trained on."""


def opened(path: str) -> Found:
    """A cache is opened; its memory is counted when all processes have it open."""
    yield {}
    before = memory_mb(Path(path))
    cache, costs = costs_of(lambda: FeatureCache(path), files=Path(path))
    yield costs.to_json()
    yield {"mb": round(memory_mb(Path(path)) - before, 3)}
    assert cache.is_complete and 0.98 < cache.is_valid.mean() < 1, path


def opened_url(url: str) -> Found:
    """A cache is opened behind a URL."""
    yield {}
    cache, costs = costs_of(lambda: FeatureCache(url))
    assert cache.is_complete
    yield costs.to_json()


def first_batch(train_path: str, val_path: str, layers: int) -> Found:
    """Two caches are opened, and training is set up and takes its first step.

    With the first optimiser of a process torch imports its compiler. That is an import, and is told by itself.
    """
    imported = time.perf_counter()
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    imported = time.perf_counter() - imported
    yield {}
    began, opening_s = time.perf_counter(), 0.0

    def stop(done: int, total: int, loss: float) -> None:
        raise _FirstStep

    def work() -> None:
        nonlocal opening_s
        caches = FeatureCache(train_path), FeatureCache(val_path)
        opening_s = time.perf_counter() - began
        options = TrainOptions(
            head="decoder1" if layers < 4 else "decoder4",
            temporal_cross_attention=caches[0].spec.has_maps,
            steps=100,
            batch=_BATCH,
        )
        with TemporaryDirectory() as folder:
            try:
                train(*caches, options=options, out=Path(folder) / "run", on_step=stop)
            except _FirstStep:
                return

    began = time.perf_counter()
    _, costs = costs_of(work)
    yield {**costs.to_json(), "opening_s": round(opening_s, 3), "optimiser_import_s": round(imported, 3)}


def listed(places: list[str]) -> Found:
    """Caches are listed as `evl-cache ls` does."""
    yield {}
    found, costs = costs_of(lambda: list(list_caches(places)))
    yield {**costs.to_json(), "caches": len(found)}


def ended(path: str) -> Found:
    """What a process of an extraction does when all blocks are done: the manifest, and what failed."""
    spec = read_description(Path(path)).spec
    yield {}

    def work() -> int:
        finish_cache(Path(path), spec, keeps_manifest=True)  # as `extract` does
        return len(FeatureCache(path).failures)

    failures, costs = costs_of(work, files=Path(path))
    yield {**costs.to_json(), "failures": failures}


def resumed(path: str, size: str) -> Found:
    """The extract command's work where all is done: of the stage itself, with the tower and the list given."""
    clips = clip_list(SIZES[size])
    job = ExtractionJob(
        clips=clips,
        root=Path(path) / "no-videos-here",
        cache_path=Path(path),
        spec=read_description(Path(path)).spec,
        tower=tower(),
    )
    yield {}
    result, costs = costs_of(lambda: extract(job, options=ExtractOptions(decode_workers=1, batch=8)))
    assert result.clips_done_here == 0
    yield costs.to_json()


def epoch_order(samples: int) -> Found:
    """The first batch of an epoch of so many samples: of all, by blocks, and of one of ten views each."""
    rows = np.arange(samples)
    yield {}
    kinds: Mapping[str, dict[str, Any]] = {
        "all": {},
        "blocks": {"shuffle_blocks": 64, "block_samples": 60},
        "views": {"views": 10},
    }
    for name, how in kinds.items():
        order = EpochOrder(samples=rows, batch=256, seed=0, **how)
        part, costs = costs_of(lambda order=order: next(order.parts(1)))  # type: ignore[misc]
        assert len(part.rows) == 256
        yield costs.to_json(f"{name}.")


def lists(clips: int) -> Found:
    """A list of so many clips: read from a file, digested, written and read as `clips.jsonl`, some of it chosen."""
    with TemporaryDirectory() as folder:
        text = Path(folder) / "list.txt"
        text.write_text(
            "".join(f"class_{i % NUM_CLASSES}/video_{i:09d}.mp4 {i % NUM_CLASSES}\n" for i in range(clips))
        )
        yield {}
        found, costs = costs_of(lambda: read_lists(text, split="train")["train"])
        yield costs.to_json("list_file.")
    _, costs = costs_of(lambda: found.content_id)
    yield costs.to_json("content_id.")
    _, costs = costs_of(lambda: clips_lines(found.clips))
    yield costs.to_json("clips_lines.")
    half = [clip.id for clip in found.clips[::2]]
    _, costs = costs_of(lambda: select(found.clips, half, source="a fold file"))
    yield costs.to_json("fold_of_half.")


def clips_read(path: str) -> Found:
    """`clips.jsonl` of a cache is read."""
    description = read_description(Path(path))
    yield {}
    _, costs = costs_of(lambda: read_clips(Path(path), description))
    yield costs.to_json()


PARTS: Mapping[str, Steps] = {
    "opened": opened,
    "opened_url": opened_url,
    "first_batch": first_batch,
    "listed": listed,
    "ended": ended,
    "resumed": resumed,
    "epoch_order": epoch_order,
    "lists": lists,
    "clips_read": clips_read,
}

if __name__ == "__main__":
    serve(PARTS)
