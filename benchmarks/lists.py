"""Lists of many clips: `python -m benchmarks.lists --json`. No video is read, and no GPU is used.

For each size, each in a process of its own: a list file is read, `clips.jsonl` and `recovery.json` are made of it, the
clips of a cache are opened, half of them are selected by name, a JSON table of as many classes is read, and a folder of
classes is listed (fewer files: they are made first). Then orders of an epoch, and what a loader makes of its samples.
Seconds are the processor's, megabytes the most that was held at a time (tracemalloc, in a second run: it slows down).
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.machine import machine
from benchmarks.support.stored_features import cache_spec, clip_list
from evl_cache.batches import samples_of_clips
from evl_cache.batches.epoch_order import EpochOrder
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.batches.folds import split_clips
from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.list_file import read_lists
from evl_cache.datasets.text_file import read_json_object
from evl_cache.spec import CacheSpec
from evl_cache.store import CacheDescription, read_clips
from evl_cache.store.format.description import clips_lines, recovery_content
from evl_cache.store.reading.indices import rows_of

CLASSES, MOST_CLASSES, MOST_FILES = 400, 100_000, 100_000
CAPPED = {"class_table", "list_folder"}  # at these
VIEWS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--samples", type=int, default=10_000_000)
    arguments = parser.parse_args()
    sizes = sorted(arguments.clips)
    found = {str(count): _alone(of_lists, count) for count in sizes}
    orders = _alone(of_orders, arguments.samples)
    for count, rows in found.items():
        _show(f"{count} clips", rows)
    _show(f"{arguments.samples} samples", orders)
    result: dict[str, Any] = {"lists": found, "orders": orders}
    result["epoch_order_s"] = max(orders[name]["s"] for name in ("plain", "by_blocks", "one_view_each"))
    if len(sizes) > 1:
        large, small = str(sizes[-1]), str(sizes[-2])
        for name in sorted(found[large].keys() - CAPPED):
            of_one = found[large][name]["s"] / sizes[-1], found[small][name]["s"] / sizes[-2]
            result[f"{name}_time_of_a_clip_ratio"] = of_one[0] / max(of_one[1], 1e-9)
    print(json.dumps({**result, "samples": arguments.samples, "machine": machine()}))


def _alone(measure: Callable[[int], dict[str, dict[str, float]]], count: int) -> dict[str, dict[str, float]]:
    """What a fresh process measures."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, count).result()


def _show(what: str, rows: dict[str, dict[str, float]]) -> None:
    for name, measured in rows.items():
        print(f"{what:>18} {name:<20} {measured['s']:8.3f} s {measured['mb']:8.1f} MB")


def _measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of the processor, the least of three runs that are short; then megabytes."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
        if seconds[-1] > 2:
            break
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"s": min(seconds), "mb": peak / 1e6}


def names(count: int) -> Iterator[tuple[str, str]]:
    """Paths and classes as Kinetics has them."""
    for row in range(count):
        label = row * CLASSES // count
        yield f"class {label:03d}/{row:011x}_000010_000020.mp4", f"class {label:03d}"


def of_lists(count: int) -> dict[str, dict[str, float]]:
    """What lists of so many clips take."""
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        return _of_lists(Path(scratch), count)


def _of_lists(scratch: Path, count: int) -> dict[str, dict[str, float]]:
    path = scratch / "list.txt"
    path.write_text("\n".join(f"{name}\t{label}" for name, label in names(count)))
    found = {"read_list": _measured(lambda: read_lists(path, split="train")["train"])}
    clips = read_lists(path, split="train")["train"]
    lines = clips_lines(clips.clips)
    found["clips_jsonl"] = _measured(lambda: clips_lines(clips.clips))
    found["recovery_json"] = _measured(lambda: recovery_content({"attributes": {}}, lines))
    spec = replace(cache_spec(clip_list(1)), num_clips=count, classes=clips.classes)
    (scratch / "clips.jsonl").write_bytes(lines)
    sha256 = hashlib.sha256(lines).hexdigest()
    description = CacheDescription(spec=spec, origin={}, created_with={}, clips_sha256=sha256)
    found["open_clips"] = _measured(lambda: read_clips(scratch, description))
    table = read_clips(scratch, description)
    found["labels"] = _measured(lambda: read_clips(scratch, description).labels)
    found["all_clips"] = _measured(lambda: sum(clip.label for clip in table))
    half = [name for row, (name, _) in enumerate(names(count)) if row % 2]
    source: Any = _Source(spec, clips=table)
    found["select_half"] = _measured(lambda: split_clips(source, source, train_names=half, val_names=None))
    classes = scratch / "labels.json"
    number = min(count, MOST_CLASSES)
    classes.write_text(json.dumps({f"Moving something {row}": str(row) for row in range(number)}, indent=0))
    found["class_table"] = _measured(lambda: read_json_object(classes, expected="labels"))
    files = min(count, MOST_FILES)
    for name, _ in names(files):
        (scratch / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / "videos" / name).touch()
    found["list_folder"] = _measured(lambda: read_folder(scratch / "videos"))
    return found


class _Source:
    """As much of a cache as lists and loaders ask for: all samples are there, and nothing can be read."""

    place, copy = "generated", None

    def __init__(self, spec: CacheSpec, clips: object = None) -> None:
        self.spec = spec
        self.clips = range(spec.num_clips) if clips is None else clips
        self.is_valid = np.ones(spec.num_samples, dtype=bool)
        self.sample_clips = np.repeat(np.arange(spec.num_clips), spec.views.per_clip)

    def rows_of(self, samples: Any) -> np.ndarray:
        return rows_of(samples, self.spec.num_samples, what="sample", place=self.place)

    def check_marks(self, samples: np.ndarray) -> None:
        np.unique(self.rows_of(samples) // self.spec.block_samples).tolist()


def of_orders(samples: int) -> dict[str, dict[str, float]]:
    """What orders of an epoch of so many samples take, and what a loader makes of them before it reads."""
    rows = np.arange(samples)
    blocks = {"shuffle_blocks": 16, "block_samples": 64 * VIEWS}
    variants: dict[str, dict[str, int]] = {
        "plain": {},
        "by_blocks": blocks,
        "one_view_each": {"views": VIEWS},
        "one_view_by_blocks": {"views": VIEWS, **blocks},
    }
    found = {
        name: _measured(lambda more=more: EpochOrder(samples=rows, batch=512, seed=0, **more).of(1))  # type: ignore[misc]
        for name, more in variants.items()
    }
    order = EpochOrder(samples=rows, batch=512, seed=0)
    found["all_parts"] = _measured(lambda: sum(len(part.rows) for part in order.parts(0)))
    spec = cache_spec(clip_list(1))
    views = replace(spec.views, temporal_views=VIEWS)
    source: Any = _Source(replace(spec, num_clips=samples // VIEWS, views=views))
    half = np.arange(0, samples // VIEWS, 2)
    found["samples_of_half"] = _measured(lambda: samples_of_clips(source, half))
    found["loader"] = _measured(
        lambda: FeatureLoader(source, samples_of_clips(source, None), batch=512, layers=(12,), shuffle_seed=0)
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
