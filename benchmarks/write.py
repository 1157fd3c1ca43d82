"""Writing a cache against zarr-python writing whole shards of the same data: `python -m benchmarks.write --json`.

ViT-B/16, 8 frames, five layers, int8 tokens and uint8 maps of generated features, four blocks. Ours takes frame
differences, compresses in two threads, computes checksums and digests, syncs, reads back and marks. zarr-python
is given the same codes, chunks and shards, with its default codecs (zstd without checksums, `vs_zarr_python`) and
with ours (`vs_zarr_python_our_codecs`); it does none of the rest. The comparison is against us on purpose: what we
sync, digest and read back is in our seconds, and zarr-python's leaves its files to the kernel.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import zarr

from benchmarks.support.machine import machine, medians
from benchmarks.support.stored_features import as_bytes, cache_spec, clip_list, generated_rows, write_rows
from evl_cache.canonical_json import canonical_json
from evl_cache.quantize import frame_difference
from evl_cache.store import Row, array_layouts


def ours(root: Path, samples: int) -> float:
    """Seconds of one block, from rows to the mark."""
    os.sync()  # what the other side left unsynced is written first: our fsync would wait for it
    started = time.perf_counter()
    write_rows(root / "cache", _rows(), samples=samples, codec="default")
    return time.perf_counter() - started


def zarr_python(root: Path, samples: int) -> float:
    """Seconds of the same codes in the same chunks and shards, as zarr-python writes them by default."""
    spec = cache_spec(clip_list(samples))
    whole = _whole(samples, differenced=False)
    os.sync()
    started = time.perf_counter()
    for name, layout in array_layouts(spec).items():
        array = zarr.create_array(
            root / name,
            shape=whole[name].shape,
            dtype=whole[name].dtype,
            chunks=(1, 1, *layout.chunk_shape),
            shards=(spec.block_samples, len(spec.layers), *layout.chunk_shape),
            fill_value=layout.fill_value,
        )
        _write_shards(array, whole[name], spec.block_samples)
    return time.perf_counter() - started


def zarr_python_our_codecs(root: Path, samples: int) -> float:
    """Seconds of the same bytes: differences, zstd at our level and with checksums."""
    spec = cache_spec(clip_list(samples))
    whole = _whole(samples, differenced=True)
    os.sync()
    started = time.perf_counter()
    for name, layout in array_layouts(spec).items():
        (root / name).mkdir()
        (root / name / "zarr.json").write_bytes(canonical_json(layout.metadata(spec)))
        _write_shards(zarr.open_array(root / name, mode="r+"), whole[name], spec.block_samples)
    return time.perf_counter() - started


def _write_shards(array: zarr.Array, values: np.ndarray, samples: int) -> None:
    """A whole shard at a time, as blocks of features come."""
    for start in range(0, len(values), samples):
        array[start : start + samples] = values[start : start + samples]


@lru_cache(maxsize=1)
def _rows() -> list[Row]:
    return generated_rows(8)


@lru_cache(maxsize=1)
def _whole(samples: int, *, differenced: bool) -> dict[str, np.ndarray]:
    """What zarr-python is given, in the form that is stored; making it is not timed."""
    rows, whole = _rows(), {}
    for name, layout in array_layouts(cache_spec(clip_list(samples))).items():
        stacked = np.stack([rows[i % len(rows)][name] for i in range(samples)])
        whole[name] = frame_difference(stacked) if layout.differenced and differenced else stacked
    return whole


SIDES = (ours, zarr_python, zarr_python_our_codecs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch, ExitStack() as stack:
        # A process each: the one's leftovers in the allocator are not the other's cost.
        pools = {side: stack.enter_context(context.Pool(1)) for side in SIDES}
        for turn in range(arguments.rounds + 1):
            for side, pool in pools.items():
                directory = Path(tempfile.mkdtemp(dir=scratch))
                taken = pool.apply(side, (directory, arguments.samples))
                shutil.rmtree(directory)  # page cache that is full of old turns slows the next ones
                if turn:
                    seconds.setdefault(side.__name__, []).append(taken)
    median = medians(seconds)
    megabytes = as_bytes(_rows()[0]) * arguments.samples / 1e6
    result = {
        "vs_zarr_python": median["zarr_python"] / median["ours"],
        "vs_zarr_python_our_codecs": median["zarr_python_our_codecs"] / median["ours"],
        **{f"{name}_mb_per_s": megabytes / seconds for name, seconds in median.items()},
        "decoded_mb": megabytes,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
