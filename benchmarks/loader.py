"""Batches of 64 into a consumer that does nothing, against a plain sequential read: `python -m benchmarks.loader --json`.

Raw profile, checked, ViT-B/16's five layers. The plain side reads the same files from end to end with `readinto`
and a large buffer. Cold: the files are dropped from the page cache before every turn.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.machine import interleaved_seconds, machine, medians
from benchmarks.stored_features import LAYERS, generated_rows, stored_nbytes, write_rows
from evl_cache.dataset import FeatureLoader
from evl_cache.store import FeatureCache

ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale")
_BUFFER_NBYTES = 8 << 20


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
        files = [file for name in ARRAYS for file in sorted((path / name / "c").rglob("*")) if file.is_file()]
        nbytes = stored_nbytes(path, ARRAYS)
        cache = FeatureCache(path)
        loaders = {
            trust: FeatureLoader(
                FeatureCache(path, trust=trust),
                np.arange(len(cache)),
                layers=LAYERS,
                batch=64,
                shuffle_seed=0,
            )
            for trust in (False, True)
        }
        plain = bytearray(_BUFFER_NBYTES)

        def sequential() -> None:
            for file in files:
                with file.open("rb", buffering=0) as opened:
                    while opened.readinto(plain):
                        pass

        def load(trust: bool) -> Callable[[], None]:
            def run() -> None:
                for _ in loaders[trust].epoch():
                    pass

            return run

        sides = {"sequential": sequential, "loader": load(False), "loader_trusted": load(True)}
        warm = medians(interleaved_seconds(sides, arguments.rounds))
        cold_sides = {name: _cold(call, files) for name, call in sides.items()}
        cold = medians(interleaved_seconds(cold_sides, arguments.rounds))
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


def _cold(call: Callable[[], None], files: list[Path]) -> Callable[[], None]:
    def run() -> None:
        call()

    def dropped() -> None:
        drop(files)
        run()

    return dropped


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
