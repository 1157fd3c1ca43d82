"""Random samples out of a warm cache, against other stores of the same bytes: `python -m benchmarks.read --json`.

ViT-B/16, 8 frames, five layers, int8 tokens and uint8 maps of generated features. Every side brings the codes and
scales of the same random samples into memory, in the same number of threads: ours into reused buffers, the others
as they give them (a new array a sample). `memmap` is a persistent `np.memmap` over the plain bytes, each sample
copied out of it; `memmap_reused` copies into reused arrays, the ceiling. Of the others, those that check integrity
are named in `checked_peers`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import interleaved_seconds, machine, medians
from benchmarks.stored_features import LAYERS, generated_rows, write_rows
from evl_cache.store import FeatureCache, Row

ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale")
# What notices a flipped bit: zstd frames and chunks with checksums do, plain containers do not.
CHECKED_PEERS = ("zarr_python", "tensorstore", "h5py")

Read = Callable[[int, Sequence[int]], None]  # slot range's thread number, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--reads", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = generated_rows(8)
    order = np.random.default_rng(0).integers(0, arguments.samples, arguments.reads).tolist()
    parts = [order[thread :: arguments.threads] for thread in range(arguments.threads)]
    with (
        tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch,
        ThreadPoolExecutor(arguments.threads) as pool,
    ):
        root = Path(scratch)
        sides = {**ours(root, rows, arguments.samples), **peers(root, rows, arguments.samples)}

        def timed(read: Read) -> Callable[[], None]:
            return lambda: list(pool.map(read, range(arguments.threads), parts)) and None

        seconds = medians(
            interleaved_seconds({n: timed(read) for n, read in sides.items()}, arguments.rounds)
        )
    result: dict[str, Any] = {
        f"{name}.vs_memmap": seconds["memmap"] / s for name, s in seconds.items() if name != "memmap"
    }
    result["default_2_of_5_layers.cost"] = seconds["default_2_layers"] / seconds["default"]
    result["raw_2_of_5_layers.cost"] = seconds["raw_2_layers"] / seconds["raw"]
    result["clips_per_s"] = {name: arguments.reads / s for name, s in seconds.items()}
    result |= {"checked_peers": CHECKED_PEERS, "threads": arguments.threads, "rounds": arguments.rounds}
    print(json.dumps({**result, "machine": machine()}))


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
    buffers = [cache.buffers(slots=1, layers=layers) for _ in range(8)]

    def read(thread: int, samples: Sequence[int]) -> None:
        cache.read_into(buffers[thread], [(0, sample) for sample in samples], layers)

    return read


def peers(root: Path, rows: list[Row], samples: int) -> dict[str, Read]:
    """The ceiling and the other stores, each holding the same arrays."""
    data = {name: np.stack([rows[i % len(rows)][name] for i in range(samples)]) for name in ARRAYS}
    outs = [{name: np.empty(data[name].shape[1:], data[name].dtype) for name in ARRAYS} for _ in range(8)]

    def reader(fetch: Callable[[str, int], Any]) -> Read:
        def read(thread: int, wanted: Sequence[int]) -> None:
            for sample in wanted:
                for name in ARRAYS:
                    fetch(name, sample)

        return read

    maps = _memmap(root, data)

    def memmap_reused(thread: int, wanted: Sequence[int]) -> None:
        for sample in wanted:
            for name in ARRAYS:
                np.copyto(outs[thread][name], maps[name][sample])

    makers = (_zarr_python, _tensorstore, _h5py, _lmdb, _safetensors, _tar)
    sides = {maker.__name__.removeprefix("_"): reader(maker(root, data)) for maker in makers}
    return {
        "memmap": reader(lambda name, sample: maps[name][sample].copy()),
        "memmap_reused": memmap_reused,
        **sides,
    }


def _memmap(root: Path, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    maps = {}
    for name, array in data.items():
        array.tofile(root / f"{name}.bin")
        maps[name] = np.memmap(root / f"{name}.bin", dtype=array.dtype, mode="r", shape=array.shape)
    return maps


def _zarr_python(root: Path, data: dict[str, np.ndarray]) -> Callable[[str, int], Any]:
    import zarr

    arrays = {name: zarr.open_array(root / "default" / name, mode="r") for name in data}
    return lambda name, sample: arrays[name][sample]


def _tensorstore(root: Path, data: dict[str, np.ndarray]) -> Callable[[str, int], Any]:
    import tensorstore

    arrays = {}
    for name in data:
        path = str(root / "default" / name)
        arrays[name] = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        ).result()
    return lambda name, sample: arrays[name][sample].read().result()


def _h5py(root: Path, data: dict[str, np.ndarray]) -> Callable[[str, int], Any]:
    import h5py

    with h5py.File(root / "peer.h5", "w") as file:
        for name, array in data.items():
            file.create_dataset(name, data=array, chunks=(1, 1, *array.shape[2:]), fletcher32=True)
    opened = h5py.File(root / "peer.h5", "r")
    return lambda name, sample: opened[name][sample]


def _lmdb(root: Path, data: dict[str, np.ndarray]) -> Callable[[str, int], Any]:
    import lmdb

    size = 2 * sum(array.nbytes for array in data.values())
    environment = lmdb.open(str(root / "peer.lmdb"), map_size=size, readahead=False)
    with environment.begin(write=True) as transaction:
        for name, array in data.items():
            for sample in range(len(array)):
                transaction.put(f"{name}/{sample}".encode(), array[sample].tobytes())

    def fetch(name: str, sample: int) -> Any:
        with environment.begin(buffers=True) as transaction:
            stored = transaction.get(f"{name}/{sample}".encode())
            return np.frombuffer(stored, data[name].dtype).reshape(data[name].shape[1:]).copy()

    return fetch


def _safetensors(root: Path, data: dict[str, np.ndarray]) -> Callable[[str, int], Any]:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    (root / "clips").mkdir()
    for sample in range(len(data["tokens"])):
        save_file(
            {name: array[sample] for name, array in data.items()}, root / "clips" / f"{sample}.safetensors"
        )

    def fetch(name: str, sample: int) -> Any:
        with safe_open(root / "clips" / f"{sample}.safetensors", framework="np") as file:
            return file.get_tensor(name)

    return fetch


def _tar(root: Path, data: dict[str, np.ndarray]) -> Callable[[str, int], Any]:
    """Webdataset's files: tar archives of one .npy a clip and array, here with an index for random access."""
    import io
    import tarfile

    with tarfile.open(root / "peer.tar", "w") as archive:
        for name, array in data.items():
            for sample in range(len(array)):
                content = io.BytesIO()
                np.save(content, array[sample])
                member = tarfile.TarInfo(f"{sample}.{name}.npy")
                member.size = content.getbuffer().nbytes
                archive.addfile(member, io.BytesIO(content.getvalue()))
    with tarfile.open(root / "peer.tar") as archive:
        places = {member.name: (member.offset_data, member.size) for member in archive}

    def fetch(name: str, sample: int) -> Any:
        offset, size = places[f"{sample}.{name}.npy"]
        with (root / "peer.tar").open("rb") as file:
            file.seek(offset)
            return np.load(io.BytesIO(file.read(size)))

    return fetch


if __name__ == "__main__":
    main()
