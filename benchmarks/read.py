"""Random samples out of a warm cache, against other stores of the same bytes: `python -m benchmarks.read --json`.

ViT-B/16, 8 frames, five layers, int8 tokens and uint8 maps of generated features. Every side brings all codes and
scales of the same random samples into memory, one sample after another, in the same number of threads: ours into
reused buffers, the others as they give them (new arrays). `memmap` is a persistent `np.memmap` over the plain
bytes, each sample copied out of it; `memmap_reused` copies into reused arrays. Of the others, those that notice
a flipped bit are named in `checked_peers`, by the profile whose bytes they hold. A ratio is the median over rounds
of two times of one round.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.machine import interleaved_seconds, machine, medians
from benchmarks.support.read_peers import CHECKED, Arrays, Peer, memmap, peers
from benchmarks.support.stored_features import LAYERS, generated_rows, write_rows
from evl_cache.quantize import frame_difference
from evl_cache.store import FeatureCache, Reads, Row

ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale")
_MORE_ROUNDS = 5  # of the sides that take no time, among themselves

Read = Callable[[int, Sequence[int]], None]  # number of the thread, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--reads", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = generated_rows(8)
    data = {name: np.stack([rows[i % 8][name] for i in range(arguments.samples)]) for name in ARRAYS}
    order = np.random.default_rng(0).integers(0, arguments.samples, arguments.reads).tolist()
    parts = [order[thread :: arguments.threads] for thread in range(arguments.threads)]
    with (
        tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch,
        ThreadPoolExecutor(arguments.threads) as pool,
    ):
        root = Path(scratch)
        sides = {**plain(root, data), **ours(root, rows, arguments.samples)}
        found = peers(root, data, threads=arguments.threads)
        others = {name: whole_samples(peer, data) for name, peer in found.items()}

        def seconds(names: Mapping[str, Read], rounds: int) -> dict[str, list[float]]:
            def timed(read: Read) -> Callable[[], None]:
                return lambda: list(pool.map(read, range(arguments.threads), parts)) and None

            return interleaved_seconds({name: timed(read) for name, read in names.items()}, rounds)

        # Apart, so that sides that are compared run close to each other in time.
        fast = {name: read for name, read in sides.items() if not name.startswith("default")}
        close = seconds(fast, _MORE_ROUNDS * arguments.rounds)
        all_sides = seconds({**sides, **others}, arguments.rounds)
    settings = {name: getattr(arguments, name) for name in ("samples", "reads", "threads", "rounds")}
    print(json.dumps({**summary(close, all_sides, arguments.reads), **settings, "machine": machine()}))


def summary(
    close: Mapping[str, list[float]], all_sides: Mapping[str, list[float]], reads: int
) -> dict[str, Any]:
    """Ratios of seconds, by round: of `close` where a side is there, of `all_sides` otherwise."""

    def ratio(base: str, name: str) -> float:
        source = close if base in close and name in close else all_sides
        return statistics.median(b / s for b, s in zip(source[base], source[name], strict=True))

    checked = {profile: [name for name in names if name in all_sides] for profile, names in CHECKED.items()}
    best = {
        profile: min(names, key=lambda name: statistics.median(all_sides[name]))
        for profile, names in checked.items()
    }
    return {
        **{f"{name}.vs_memmap": ratio("memmap", name) for name in all_sides if name != "memmap"},
        "default_2_of_5_layers.cost": ratio("default_2_layers", "default"),
        "raw_2_of_5_layers.cost": ratio("raw_2_layers", "raw"),
        **{
            f"{profile}.vs_{name}": ratio(name, profile)
            for profile, names in checked.items()
            for name in names
        },
        **{f"{profile}.vs_best_checked_peer": ratio(name, profile) for profile, name in best.items()},
        # Not like with like, its bytes are not compressed:
        **({"default.vs_h5py": ratio("h5py", "default")} if "h5py" in all_sides else {}),
        "best_checked_peer": best,
        "checked_peers": checked,
        "clips_per_s": {name: reads / s for name, s in medians({**all_sides, **close}).items()},
    }


def ours(root: Path, rows: list[Row], samples: int) -> dict[str, Read]:
    """Checked and trusted reads of both profiles, and of two of five layers."""
    sides: dict[str, Read] = {}
    for codec in ("raw", "default"):
        write_rows(root / codec, rows, samples=samples, codec=codec)
        for suffix, trust, layers in (
            ("", False, LAYERS),
            ("_trusted", True, LAYERS),
            ("_2_layers", False, LAYERS[-2:]),
        ):
            sides[codec + suffix] = _ours(FeatureCache(root / codec, trust=trust), layers)
    return sides


def _ours(cache: FeatureCache, layers: tuple[int, ...]) -> Read:
    buffers = [cache.buffers(slots=1, reads=Reads(layers=layers)) for _ in range(8)]

    def read(thread: int, samples: Sequence[int]) -> None:
        cache.read_into(buffers[thread], [(0, sample) for sample in samples], layers)

    return read


def plain(root: Path, data: Arrays) -> dict[str, Read]:
    """`np.memmap` of the same bytes, into new arrays and into reused ones."""
    maps = memmap(root, data)
    outs = [{name: np.empty(array.shape[1:], array.dtype) for name, array in data.items()} for _ in range(8)]

    def reused(thread: int, wanted: Sequence[int]) -> None:
        for sample in wanted:
            for name, array in maps.items():
                np.copyto(outs[thread][name], array[sample])

    new = whole_samples(lambda sample: {name: array[sample].copy() for name, array in maps.items()}, data)
    return {"memmap": new, "memmap_reused": reused}


def whole_samples(peer: Peer, data: Arrays) -> Read:
    """Reads of a peer, which is looked at first: does it give what was stored?"""
    for name, array in peer(1).items():
        # Foreign readers of the default profile get the differences between frames, and need not sum them here.
        differenced = array.dtype.itemsize == 1
        stored = [data[name][1], *([frame_difference(data[name][1])] if differenced else [])]
        assert any(np.array_equal(array, values) for values in stored), name

    def read(thread: int, wanted: Sequence[int]) -> None:
        for sample in wanted:
            peer(sample)

    return read


if __name__ == "__main__":
    main()
