"""What a user would otherwise keep features in, for `benchmarks.read`: each holds the same arrays.

A peer is a function of a sample that gives all arrays of it by name, new ones.
"""

import io
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.quantize import frame_difference

Arrays = Mapping[str, np.ndarray[Any, Any]]
Peer = Callable[[int], Arrays]

# What notices a flipped bit (zstd frames and chunks with checksums do, plain containers do not), by profile: peers
# of `default` hold the same codes at the same level of zstd, those of `raw` the plain bytes.
CHECKED = {
    "default": ("zarr_python", "tensorstore", "h5py_zstd"),
    "raw": ("zarr_python_raw", "tensorstore_raw", "h5py"),
}


def peers(root: Path, data: Arrays, *, threads: int) -> dict[str, Peer]:
    """Those that are installed, written below `root`, where caches of the profiles `default` and `raw` lie.

    threads: of the reader; a peer that has threads of its own gets as many.
    """
    every: dict[str, Callable[[], Peer]] = {
        "zarr_python": lambda: _zarr_python(root / "default", data),
        "zarr_python_raw": lambda: _zarr_python(root / "raw", data),
        "tensorstore": lambda: _tensorstore(root / "default", data, threads),
        "tensorstore_raw": lambda: _tensorstore(root / "raw", data, threads),
        "h5py": lambda: _h5py(root / "peer.h5", data),
        "h5py_zstd": lambda: _h5py_zstd(root, data),
        "lmdb": lambda: _lmdb(root, data),
        "safetensors": lambda: _safetensors(root, data),
        "webdataset": lambda: _webdataset(root, data),
    }
    found = {}
    for name, peer in every.items():
        try:
            found[name] = peer()
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}; pip install 'evl-cache[bench]'", file=sys.stderr)
    return found


def memmap(root: Path, data: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """The plain bytes of each array in a file, mapped."""
    maps = {}
    for name, array in data.items():
        array.tofile(root / f"{name}.bin")
        maps[name] = np.memmap(root / f"{name}.bin", dtype=array.dtype, mode="r", shape=array.shape)
    return maps


def _zarr_python(cache: Path, data: Arrays) -> Peer:
    import zarr

    arrays: dict[str, Any] = {name: zarr.open_array(cache / name, mode="r") for name in data}
    return lambda sample: {name: array[sample] for name, array in arrays.items()}


def _tensorstore(cache: Path, data: Arrays, threads: int) -> Peer:
    import tensorstore

    limit = {"limit": threads}
    context = {"data_copy_concurrency": limit, "file_io_concurrency": limit}
    arrays = {}
    for name in data:
        kvstore = {"driver": "file", "path": str(cache / name)}
        spec = {"driver": "zarr3", "kvstore": kvstore, "context": context}
        arrays[name] = tensorstore.open(spec).result()

    def fetch(sample: int) -> Arrays:
        reads = {name: array[sample].read() for name, array in arrays.items()}  # all at once
        return {name: read.result() for name, read in reads.items()}

    return fetch


def _h5py(path: Path, data: Arrays, **compression: Any) -> Peer:
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in data.items():
            chunks = (1, 1, *array.shape[2:])
            file.create_dataset(name, data=array, chunks=chunks, fletcher32=True, **compression)
    opened = h5py.File(path, "r")
    return lambda sample: {name: opened[name][sample] for name in data}


def _h5py_zstd(root: Path, data: Arrays) -> Peer:
    """The codes of the profile `default`, as differences between frames, and its level of zstd."""
    import hdf5plugin

    codes = {
        name: frame_difference(array) if array.dtype == np.int8 else array for name, array in data.items()
    }
    return _h5py(root / "peer-zstd.h5", codes, compression=hdf5plugin.Zstd(clevel=1))


def _lmdb(root: Path, data: Arrays) -> Peer:
    import lmdb

    size = 2 * sum(array.nbytes for array in data.values())
    environment = lmdb.open(str(root / "peer.lmdb"), map_size=size, readahead=False)
    with environment.begin(write=True) as transaction:
        for name, array in data.items():
            for sample in range(len(array)):
                transaction.put(f"{name}/{sample}".encode(), array[sample].tobytes())

    def fetch(sample: int) -> Arrays:
        with environment.begin(buffers=True) as transaction:
            return {
                name: np.frombuffer(transaction.get(f"{name}/{sample}".encode()), array.dtype)
                .reshape(array.shape[1:])
                .copy()
                for name, array in data.items()
            }

    return fetch


def _safetensors(root: Path, data: Arrays) -> Peer:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    (root / "clips").mkdir()
    for sample in range(len(data["tokens"])):
        one = {name: array[sample] for name, array in data.items()}
        save_file(one, root / "clips" / f"{sample}.safetensors")

    def fetch(sample: int) -> Arrays:
        with safe_open(root / "clips" / f"{sample}.safetensors", framework="np") as file:
            return {name: file.get_tensor(name) for name in data}

    return fetch


def _webdataset(root: Path, data: Arrays) -> Peer:
    """Its archives and its decoder; it reads in sequence only, so that the index for random access is ours."""
    import webdataset
    from webdataset.autodecode import npy_loads

    path = root / "peer.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for sample in range(len(data["tokens"])):
            one = {f"{name}.npy": array[sample] for name, array in data.items()}
            writer.write({"__key__": f"{sample:06d}", **one})
    with tarfile.open(path) as archive:
        places = {member.name: (member.offset_data, member.size) for member in archive}

    def fetch(sample: int) -> Arrays:
        out = {}
        with io.FileIO(path) as file:
            for name in data:
                offset, size = places[f"{sample:06d}.{name}.npy"]
                file.seek(offset)
                out[name] = npy_loads(file.read(size))
        return out

    return fetch
