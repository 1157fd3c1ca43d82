"""Epochs of a cache in an S3 bucket against the same on the disk: `python -m benchmarks.remote --json`.

moto's S3 server on loopback; a loader in the order of a training from far away (16 blocks at a time), and a consumer
that does nothing. ViT-B/16's sizes, five layers with maps, of both profiles. The first epoch opens the cache and fetches
every sample through the read-through copy; it is as fast as that server is, which reads a whole object for every range
(blocks are of 32 clips, so that these are not too large). Later epochs read the copy. Both sides lie on
one disk and are in the page cache. A ratio is the median over rounds of the seconds of the local side over those of
the other; `requests_a_sample` counts the ranged requests for shards of a first epoch in the server's own log.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.machine import interleaved_seconds, machine
from benchmarks.support.stored_features import LAYERS, generated_rows, write_rows
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.caches.share import push
from evl_cache.store import FeatureCache
from evl_cache.train.loaders import BLOCKS_AT_A_TIME
from tests.support.servers import KEYS, s3_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block-clips", type=int, default=32)
    parser.add_argument("--first-rounds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="on the disk to measure [a temporary one]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-", dir=arguments.directory) as scratch:
        root = Path(scratch)
        rows = generated_rows(8)
        with s3_server(root / "log") as address, environment(AWS_ENDPOINT_URL=address, **KEYS):
            result: dict[str, Any] = {}
            for codec, prefix in (("default", ""), ("raw", "raw_")):
                write_rows(
                    root / codec,
                    rows,
                    samples=arguments.samples,
                    codec=codec,
                    block_clips=arguments.block_clips,
                )
                push(root / codec, f"s3://lab/{codec}")
                found = measure(root / codec, f"s3://lab/{codec}", root, arguments)
                result |= {prefix + name: value for name, value in found.items()}
    settings = {
        name: getattr(arguments, name)
        for name in ("samples", "batch", "block_clips", "rounds", "first_rounds")
    }
    print(json.dumps({**result, **settings, "machine": machine()}))


def measure(path: Path, url: str, root: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Ratios and rates of one cache."""
    copies = iter(range(1_000_000))
    remote: list[FeatureCache] = []

    def first_remote() -> None:
        with environment(EVL_CACHE_COPY_ROOT=str(root / f"copy-{path.name}-{next(copies)}")):
            remote[:] = [FeatureCache(url)]
        run_epoch(make_loader(remote[0], arguments.batch))

    def first_local() -> None:
        run_epoch(make_loader(FeatureCache(path), arguments.batch))

    asked = ranged_requests(root / "log")
    first = interleaved_seconds({"local": first_local, "remote": first_remote}, arguments.first_rounds)
    asked = ranged_requests(root / "log") - asked
    later = later_epochs({"local": FeatureCache(path), "remote": remote[0]}, arguments)
    return {
        "first_epoch_vs_local": ratio(first),
        "later_epochs_vs_local": ratio(later),
        "requests_a_sample": asked / (arguments.first_rounds + 1) / arguments.samples,
        "first_clips_per_s": arguments.samples / statistics.median(first["remote"]),
        "first_mb_per_s": remote[0].copy.nbytes / statistics.median(first["remote"]) / 1e6,  # type: ignore[union-attr]
        "later_clips_per_s": arguments.samples / statistics.median(later["remote"]),
        "local_clips_per_s": arguments.samples / statistics.median(later["local"]),
    }


def later_epochs(caches: dict[str, FeatureCache], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by side. Buffers are made anew four times, of either side first: copies into one that got huge pages are
    several per cent faster than into one that did not."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(4):
        names = sorted(caches, reverse=bool(turn % 2))
        loaders = {name: make_loader(caches[name], arguments.batch) for name in names}
        sides = {name: lambda loader=loader: run_epoch(loader) for name, loader in loaders.items()}
        for name, values in interleaved_seconds(sides, arguments.rounds).items():
            seconds[name] += values
    return seconds


def ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(seconds["local"], seconds["remote"], strict=True))


def make_loader(cache: FeatureCache, batch: int) -> FeatureLoader:
    order = np.arange(len(cache))
    return FeatureLoader(
        cache, order, layers=LAYERS, batch=batch, shuffle_seed=0, shuffle_blocks=BLOCKS_AT_A_TIME
    )


def run_epoch(loader: FeatureLoader) -> None:
    for _ in loader.epoch():
        pass


def ranged_requests(log: Path) -> int:
    """Answers with a part of a shard."""
    return sum(
        '"GET ' in line and "/c." in line and '" 206 ' in line
        for line in log.read_text(errors="replace").splitlines()
    )


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    main()
