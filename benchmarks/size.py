"""Megabytes a sample, ViT-B/16, 8 frames, layers 8-12: `python -m benchmarks.size --json`.

Every cache is written to disk by the store, and its shards and marks are counted; beside them what a user would
do without us, `torch.save` of tokens, queries and keys in fp32. `recompute` keeps the tokens of layer 7 too, and
once a cache the projections, which are counted on their own.
"""

import argparse
import io
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.outlier_features import softmax_maps
from benchmarks.support.machine import machine
from benchmarks.support.stored_features import LAYERS, cache_spec, clip_list
from benchmarks.support.study_features import StudyFeatures, generated, queries_and_keys, ut_interaction
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    LOCKS_NAME,
    PROJECTIONS_NAME,
    BlockWriter,
    ClipRecord,
    LockWatcher,
    create_cache,
    make_row,
)

STORAGES: dict[str, dict[str, str]] = {
    "default": {},
    "raw": {"codec": "raw"},
    "archive": {"codec": "archive"},
    "recompute": {"maps": "recompute"},
    "recompute_archive": {"maps": "recompute", "codec": "archive"},
    "no_maps": {"maps": "none"},
    "fp16": {"tokens": "fp16", "maps": "fp16", "codec": "raw"},
}
LIMITS = {"default": 8.0, "raw": 9.2, "archive": 7.0, "recompute": 6.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=6, help="of either kind")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"unit": "MB a sample", "limits": LIMITS, "clips": arguments.clips}
    sources = [generated(arguments.clips)]
    sources += [found for found in (ut_interaction(arguments.clips),) if found is not None]
    for features in sources:
        sizes = measure(features)
        result[features.name] = sizes
        result[f"{features.name}_within_limits"] = all(sizes[name] <= LIMITS[name] for name in LIMITS)
    result["generated_independent_map_rows"] = measure(_independent_rows(sources[0]))
    print(json.dumps({**result, "machine": machine()}))


def measure(features: StudyFeatures) -> dict[str, float]:
    """Megabytes a sample of every storage, and of the dump."""
    out = {}
    for name, changes in STORAGES.items():
        with tempfile.TemporaryDirectory(prefix="evl-cache-size-") as scratch:
            path = Path(scratch) / "cache"
            _write(features, path, changes)
            files = [*path.glob("*/c.*"), *path.glob("done/*")]
            out[name] = sum(f.stat().st_size for f in files if f.is_file()) / 1e6 / len(features.tokens)
            if name == "recompute":
                out["recompute_once_a_cache"] = (path / PROJECTIONS_NAME).stat().st_size / 1e6
    out["dump_fp32"] = _dump_nbytes(features) / 1e6
    return out


def _write(features: StudyFeatures, path: Path, changes: dict[str, Any]) -> CacheSpec:
    clips = clip_list(len(features.tokens))
    spec = replace(cache_spec(clips, block_clips=len(clips.clips)), **changes)
    projections = features.projections if spec.recomputes_maps else None
    create_cache(path, spec, clips.clips, origin={}, created_with={}, projections=projections)
    lock = LockWatcher(path / LOCKS_NAME).take(0)
    assert lock is not None
    with ThreadPoolExecutor(2) as encoders, lock:
        writer = BlockWriter(path, spec, 0, lock=lock, encoders=encoders)
        for tokens, maps in zip(features.tokens, features.maps, strict=True):
            kept = [tokens[layer] for layer in spec.stored_layers]
            writer.append(make_row(kept, [maps[x] for x in LAYERS] if spec.stores_maps else None, spec))
        writer.commit([ClipRecord(id=clip.id) for clip in clips.clips], {})
        writer.close()
    return spec


def _dump_nbytes(features: StudyFeatures) -> int:
    """Of the first clip: all are equally large."""
    tokens = features.tokens[0]
    both = [queries_and_keys(tokens[layer - 1], features.projections[layer]) for layer in LAYERS]
    file = io.BytesIO()
    content = {"tokens": [tokens[layer].clone() for layer in LAYERS]}
    torch.save({**content, "q": [q for q, _ in both], "k": [k for _, k in both]}, file)
    return file.tell()


def _independent_rows(features: StudyFeatures) -> StudyFeatures:
    """The same with maps whose rows have nothing to do with each other: the worst case for a codec."""
    maps = []
    for seed in range(len(features.tokens)):
        values = softmax_maps(clips=1, seed=seed)[0]
        maps.append(dict(zip(LAYERS, values, strict=True)))
    return replace(features, maps=maps)


if __name__ == "__main__":
    main()
