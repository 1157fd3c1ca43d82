"""Writing a cache against zarr-python writing whole shards of the same data: `python -m benchmarks.write --json`.

ViT-B/16, 8 frames, five layers, int8 tokens and uint8 maps of generated features, one block. Ours compresses in
two threads, computes checksums and digests, syncs, reads back and marks; zarr-python writes the same arrays with
the same codecs, a whole shard at a time, without any of that.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import zarr

from benchmarks.machine import interleaved_seconds, machine, medians
from benchmarks.stored_features import as_bytes, cache_spec, clip_list, generated_rows, write_rows
from evl_cache.quantize import frame_difference
from evl_cache.store import array_layouts
from evl_cache.store.publish import canonical_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = generated_rows(8)
    samples = arguments.samples
    spec = cache_spec(clip_list(samples))
    # What zarr-python is given, in the form that is stored; making it is not timed.
    layouts = array_layouts(spec)
    whole = {}
    for name, layout in layouts.items():
        stacked = np.stack([rows[i % len(rows)][name] for i in range(samples)])
        whole[name] = frame_difference(stacked) if layout.differenced else stacked
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        root = Path(scratch)

        # A new directory each time: removing the last one is not part of writing.
        def ours() -> None:
            write_rows(Path(tempfile.mkdtemp(dir=root)) / "cache", rows, samples=samples, codec="default")

        def zarr_python() -> None:
            group = Path(tempfile.mkdtemp(dir=root))
            for name, layout in layouts.items():
                (group / name).mkdir()
                (group / name / "zarr.json").write_bytes(canonical_json(layout.metadata(spec)))
                zarr.open_array(group / name, mode="r+")[:] = whole[name]

        seconds = medians(interleaved_seconds({"ours": ours, "zarr_python": zarr_python}, arguments.rounds))
    megabytes = as_bytes(rows[0]) * samples / 1e6
    result = {
        "vs_zarr_python": seconds["zarr_python"] / seconds["ours"],
        "ours_mb_per_s": megabytes / seconds["ours"],
        "zarr_python_mb_per_s": megabytes / seconds["zarr_python"],
        "decoded_mb": megabytes,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
