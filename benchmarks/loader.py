"""Batches of 64 into a consumer that does nothing, against a plain sequential read: `python -m benchmarks.loader --json`.

Raw profile, checked, ViT-B/16's five layers. The plain side reads the same files from end to end, one after
another, into a reused buffer as large as a batch. Cold: the files are dropped from the page cache before every
turn, and nothing has them open.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.support.machine import interleaved_seconds, machine, medians
from benchmarks.support.stored_features import LAYERS, generated_rows, stored_nbytes, write_rows
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.store import FeatureCache

ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale")
_PIECE_NBYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--directory", type=Path, help="on the disk to measure [a temporary one]")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-", dir=arguments.directory) as scratch:
        path = Path(scratch) / "cache"
        write_rows(path, generated_rows(8), samples=arguments.samples, codec=arguments.codec)
        files = [file for name in ARRAYS for file in sorted((path / name).glob("c.*"))]
        nbytes = stored_nbytes(path, ARRAYS)
        plain = np.zeros(64 * nbytes // arguments.samples, np.uint8)

        def sequential() -> None:
            filled = 0
            for file in files:
                with file.open("rb", buffering=0) as opened:
                    while count := opened.readinto(plain[filled : filled + _PIECE_NBYTES].data):
                        filled = filled + count if filled + count < len(plain) else 0

        caches = {trust: FeatureCache(path, trust=trust) for trust in (False, True)}

        def load(trust: bool) -> Callable[[], None]:
            order = np.arange(arguments.samples)
            loader = FeatureLoader(caches[trust], order, layers=LAYERS, batch=64, shuffle_seed=0)

            def run() -> None:
                for _ in loader.epoch():
                    pass

            return run

        def chill() -> None:
            for cache in caches.values():  # pages of a mapped file stay
                cache.close()
            drop(files)

        sides = {"sequential": sequential, "loader": load(False), "loader_trusted": load(True)}
        warm = medians(interleaved_seconds(sides, arguments.rounds))
        cold = medians(interleaved_seconds(sides, arguments.rounds, before=chill))
    result = {
        "warm_vs_sequential": warm["sequential"] / warm["loader"],
        "cold_vs_sequential": cold["sequential"] / cold["loader"],
        "warm_trusted_vs_sequential": warm["sequential"] / warm["loader_trusted"],
        "cold_trusted_vs_sequential": cold["sequential"] / cold["loader_trusted"],
        "warm_gb_per_s": nbytes / warm["loader"] / 1e9,
        "warm_sequential_gb_per_s": nbytes / warm["sequential"] / 1e9,
        "cold_gb_per_s": nbytes / cold["loader"] / 1e9,
        "cold_sequential_gb_per_s": nbytes / cold["sequential"] / 1e9,
        "clips_per_s_warm": arguments.samples / warm["loader"],
        "codec": arguments.codec,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
