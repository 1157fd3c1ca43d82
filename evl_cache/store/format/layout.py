"""The arrays of a cache: names, shapes, dtypes and codecs that follow from its spec.

T frames, P patches, N = 1+P tokens, C channels. A chunk is one sample x one layer; a shard is one block of
samples x all layers.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evl_cache.errors import UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.shards.codec import ChunkCodec
from evl_cache.store.shards.metadata import array_metadata, shard_path

ATTRIBUTE = "evl_cache"
CLIPS_NAME = "clips.jsonl"
DONE_NAME = "done"
LOCKS_NAME = "locks"
MANIFEST_NAME = "manifest.json"
PROJECTIONS_NAME = "recompute.safetensors"
RECOVERY_NAME = "recovery.json"

# Measured (docs/rate-distortion.md): level 3 saves 0 to 1 % over 1 for twice the time; 12 saves nothing over 9.
_PROFILES = {
    "default": ChunkCodec("zstd", zstd_level=1),
    "raw": ChunkCodec("raw"),
    "archive": ChunkCodec("zstd", zstd_level=9),
}
_DIFFERENCED = {"default": True, "raw": False, "archive": True}


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array of the store.

    Attributes:
        name: of its directory.
        dtype: as numpy names it.
        chunk_shape: values of one sample and layer (without those two axes).
        axes: names of the axes of a chunk.
        fill_value: what a foreign reader sees where a clip failed.
        codec: of a chunk.
        differenced: codes are stored as frame-to-frame differences, modulo 256, along the first chunk axis
            that counts frames.
    """

    name: str
    dtype: str
    chunk_shape: tuple[int, ...]
    axes: tuple[str, ...]
    fill_value: float
    codec: ChunkCodec
    differenced: bool = False

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk_shape) * {"int8": 1, "uint8": 1, "float16": 2, "float32": 4}[self.dtype]

    def check_stack(self, stack: NDArray[Any], num_layers: int) -> None:
        """Raises: UsageError unless chunks of so many layers can be read into it, (L, slots, *chunk)."""
        found = (stack.dtype, len(stack), stack.shape[2:])
        if found != (np.dtype(self.dtype), num_layers, self.chunk_shape) or not stack.flags.c_contiguous:
            expected = (self.dtype, num_layers, self.chunk_shape)
            raise UsageError(
                f"buffer of {self.name}: dtype, layers, chunk are {found}, stored are {expected}: "
                "use buffers of the same cache and layers, C-contiguous"
            )

    def metadata(self, spec: CacheSpec) -> dict[str, Any]:
        """The array's `zarr.json`."""
        layers = len(spec.stored_layers)
        return array_metadata(
            shape=(spec.num_samples, layers, *self.chunk_shape),
            dtype=self.dtype,
            chunk_shape=(1, 1, *self.chunk_shape),
            shard_shape=(spec.block_samples, layers, *self.chunk_shape),
            fill_value=self.fill_value,
            codec=self.codec,
            attributes={
                ATTRIBUTE: {"frame_difference": self.differenced, "layers": list(spec.stored_layers)}
            },
            dimension_names=("sample", "layer", *self.axes),
        )

    def shard(self, root: Path, block: int) -> Path:
        """Where block's shard lies."""
        return shard_path(root / self.name, block, 2 + len(self.chunk_shape))


def array_layouts(spec: CacheSpec) -> Mapping[str, ArrayLayout]:
    """Arrays by name, in the order in which a block's files are published."""
    nan = float("nan")
    frames, tokens, width = spec.views.frames, spec.num_tokens, spec.tower.width
    patches = tokens - 1
    codec, differenced = _PROFILES[spec.codec], _DIFFERENCED[spec.codec]
    out = []
    if spec.tokens == "int8":
        out += [
            ArrayLayout(
                name="tokens", dtype="int8", chunk_shape=(frames, tokens, width), axes=("frame", "token", "channel"),
                fill_value=0, codec=codec, differenced=differenced,
            ),
            ArrayLayout(
                name="token_affine", dtype="float32", chunk_shape=(2, width), axes=("scale_offset", "channel"),
                fill_value=nan, codec=codec,
            ),
            ArrayLayout(
                name="token_scale", dtype="float16", chunk_shape=(frames, tokens), axes=("frame", "token"),
                fill_value=nan, codec=codec,
            ),
        ]  # fmt: skip
    else:
        out.append(
            ArrayLayout(
                name="tokens", dtype="float16", chunk_shape=(frames, tokens, width), axes=("frame", "token", "channel"),
                fill_value=nan, codec=codec,
            )
        )  # fmt: skip
    if spec.stores_maps:
        axes = ("prev_next", "pair", "query", "key")
        shape = (2, frames - 1, patches, patches)
        if spec.maps == "uint8":
            out += [
                ArrayLayout(name="maps", dtype="uint8", chunk_shape=shape, axes=axes, fill_value=0, codec=codec),
                ArrayLayout(
                    name="map_scale", dtype="float16", chunk_shape=shape[:-1], axes=axes[:-1], fill_value=nan, codec=codec
                ),
            ]  # fmt: skip
        else:
            out.append(
                ArrayLayout(
                    name="maps", dtype="float16", chunk_shape=shape, axes=axes, fill_value=nan, codec=codec
                )
            )
    out.append(
        ArrayLayout(
            name="class_tokens", dtype="float16", chunk_shape=(frames, width), axes=("frame", "channel"),
            fill_value=nan, codec=codec,
        )
    )  # fmt: skip
    return {layout.name: layout for layout in out}


def mark_path(root: Path, block: int) -> Path:
    """Where block's done mark lies."""
    return root / DONE_NAME / f"{block:06d}.json"


def marked_blocks(root: Path) -> set[int]:
    """Blocks that have a done mark, intact or not: one look at the directory for all of them."""
    with contextlib.suppress(OSError):
        names = os.listdir(root / DONE_NAME)
        return {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}
    return set()


def as_range(positions: Sequence[int]) -> Sequence[int]:
    """Evenly spaced ascending positions as a range, which is read faster; others as they are."""
    if not positions:
        return positions
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if step < 1:
        return positions
    evenly = range(positions[0], positions[-1] + 1, step)
    return evenly if list(evenly) == list(positions) else positions
