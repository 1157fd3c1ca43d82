"""The `zarr.json` documents of our arrays and groups, and where their shards lie (Zarr v3 core, sharding)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from evl_cache.errors import UsageError
from evl_cache.store.shards.codec import ChunkCodec

METADATA_NAME = "zarr.json"
STORED_DTYPES = ("int8", "uint8", "float16", "float32")


def array_metadata(
    *,
    shape: Sequence[int],
    dtype: DTypeLike,
    chunk_shape: Sequence[int],
    shard_shape: Sequence[int],
    fill_value: float,
    codec: ChunkCodec,
    attributes: Mapping[str, Any],
    dimension_names: Sequence[str],
    separator: str = ".",
) -> dict[str, Any]:
    """Return the metadata of a sharded Zarr v3 array: a shard is one file, a chunk is what can be read alone.

    `separator`: as of `shard_name`. Raises UsageError where the shapes, the names or the dtype contradict one another.
    """
    name = np.dtype(dtype).name
    if name not in STORED_DTYPES:
        raise UsageError(f"cannot store dtype {name}: use one of {', '.join(STORED_DTYPES)}")
    if not len(shape) == len(chunk_shape) == len(shard_shape) == len(dimension_names):
        raise UsageError(
            f"shape {tuple(shape)}, chunk_shape {tuple(chunk_shape)}, shard_shape {tuple(shard_shape)} and "
            f"dimension_names {tuple(dimension_names)} differ in length: give one entry for each axis"
        )
    if any(chunk < 1 or shard % chunk for chunk, shard in zip(chunk_shape, shard_shape, strict=True)):
        raise UsageError(
            f"shard_shape {tuple(shard_shape)} is no multiple of chunk_shape {tuple(chunk_shape)}"
        )
    sharding = {
        "chunk_shape": list(chunk_shape),
        "codecs": codec.zarr_codecs(name),
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": separator}},
        "fill_value": _fill_value(np.dtype(dtype), fill_value),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": dict(attributes),
        "dimension_names": list(dimension_names),
    }


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def shard_name(block: int, num_axes: int, separator: str = ".") -> str:
    """Return the name, below its array's directory, of shard `block` along the first axis; it spans all other axes.

    `separator`: "." or "/", between the numbers of Zarr's default chunk keys; "/" makes each number a directory.
    """
    return f"c{separator}{block}{f'{separator}0' * (num_axes - 1)}"


def _fill_value(dtype: np.dtype[Any], value: float) -> int | float | str:
    if dtype.kind != "f":
        return int(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)
