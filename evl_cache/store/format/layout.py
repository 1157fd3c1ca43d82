"""The arrays of a cache: names, shapes, dtypes and codecs that follow from its spec.

T frames, P patches, N = 1+P tokens, C channels. A chunk is one sample x one layer; a shard is one block of
samples x all layers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evl_cache.errors import UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import is_there, names_in
from evl_cache.store.shards.codec import ChunkCodec
from evl_cache.store.shards.metadata import array_metadata, shard_name

ATTRIBUTE = "evl_cache"
CLIPS_NAME = "clips.jsonl"
DONE_NAME = "done"
LOCKS_NAME = "locks"
MANIFEST_NAME = "manifest.json"
PROJECTIONS_NAME = "recompute.safetensors"
RECOVERY_NAME = "recovery.json"
_REDO_SUFFIX = ".redo"
_KEPT = "_array_layouts"
_BLOCK_NUMBER = re.compile("[0-9]{6}|[1-9][0-9]{6,11}")  # as marks are named, and no other
_SHARD_NUMBER = re.compile("0|[1-9][0-9]{0,11}")  # as shards are
_SEPARATORS = {"flat": ".", "folders": "/"}  # by `CacheSpec.chunk_keys`

# Measured (docs/rate-distortion.md): level 3 saves 0 to 1 % over 1 for twice the time; 12 saves nothing over 9.
_PROFILES = {
    "default": ChunkCodec("zstd", zstd_level=1),
    "raw": ChunkCodec("raw"),
    "archive": ChunkCodec("zstd", zstd_level=9),
}


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One array of the store.

    Attributes:
        name: name of its directory.
        dtype: data type, as numpy names it.
        chunk_shape: shape of the values of one sample and layer (without those two axes).
        axes: names of the axes of a chunk.
        codec: how a chunk is stored.
        differenced: whether codes are stored as frame-to-frame differences, modulo 256, along the first chunk axis
            that counts frames: these compress better.
        separator: between the numbers of a shard's name; "/" makes each a directory.
    """

    name: str
    dtype: str
    chunk_shape: tuple[int, ...]
    axes: tuple[str, ...]
    codec: ChunkCodec
    differenced: bool = False
    separator: str = "."

    @property
    def fill_value(self) -> float:
        """What a foreign reader sees where a clip failed: NaN, or 0 where the dtype has none."""
        return math.nan if self.dtype.startswith("float") else 0

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    def check_stack(self, stack: NDArray[Any], num_layers: int) -> None:
        """Check that chunks of so many layers can be read into a buffer (L, slots, *chunk). Raises: UsageError."""
        found = (stack.dtype, len(stack), stack.shape[2:])
        if found != (np.dtype(self.dtype), num_layers, self.chunk_shape) or not stack.flags.c_contiguous:
            expected = (self.dtype, num_layers, self.chunk_shape)
            raise UsageError(
                f"buffer of {self.name}: dtype, layers, chunk are {found}, stored are {expected}: "
                "use buffers of the same cache and layers, C-contiguous"
            )

    def metadata(self, spec: CacheSpec) -> dict[str, Any]:
        """Return the array's `zarr.json`."""
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
            separator=self.separator,
        )

    def shard(self, cache_path: Path, block: int) -> Path:
        """Return where a block's shard lies."""
        return cache_path / self.name / shard_name(block, self._num_axes, self.separator)

    def shard_name(self, block: int) -> str:
        """Return the same as a manifest names it: relative to the cache, and much faster for a million files."""
        return f"{self.name}/{shard_name(block, self._num_axes, self.separator)}"

    @property
    def shards_share_directory(self) -> bool:
        """Whether shards of all blocks lie in one directory, which grows with the cache."""
        return self.separator == "."

    def blocks_directory(self, cache_path: Path) -> Path:
        """Return the directory in which every block has a name of its own."""
        return cache_path / self.name / ("" if self.shards_share_directory else "c")

    def blocks_there(self, cache_path: Path) -> set[int]:
        """Return the blocks of which the array has a file, or a folder for one. Raises: CacheError where the disk refuses."""
        numbers = names_in(self.blocks_directory(cache_path))
        if self.shards_share_directory:
            rest = ".0" * (self._num_axes - 1)
            numbers = [name[2 : -len(rest)] for name in numbers if name[:2] == "c." and name.endswith(rest)]
        return {int(number) for number in numbers if _SHARD_NUMBER.fullmatch(number)}

    @property
    def _num_axes(self) -> int:
        return 2 + len(self.chunk_shape)


def array_layouts(spec: CacheSpec) -> Mapping[str, ArrayLayout]:
    """Return the arrays by name, in the order in which a block's files are published."""
    # Kept with the spec, which never changes: it is asked for with each of 40,000 blocks.
    found: Mapping[str, ArrayLayout] | None = spec.__dict__.get(_KEPT)
    if found is None:
        found = spec.__dict__[_KEPT] = _made_layouts(spec)
    return found


def _made_layouts(spec: CacheSpec) -> Mapping[str, ArrayLayout]:
    frames, tokens, width = spec.views.frames, spec.num_tokens, spec.tower.width
    codec, separator = _PROFILES[spec.codec], _SEPARATORS[spec.chunk_keys]
    out: dict[str, ArrayLayout] = {}

    def add(name: str, dtype: str, axes: Mapping[str, int], *, differenced: bool = False) -> None:
        out[name] = ArrayLayout(
            name=name,
            dtype=dtype,
            chunk_shape=tuple(axes.values()),
            axes=tuple(axes),
            codec=codec,
            differenced=differenced,
            separator=separator,
        )

    token_axes = {"frame": frames, "token": tokens, "channel": width}
    if spec.tokens == "int8":
        add("tokens", "int8", token_axes, differenced=codec.name == "zstd")
        add("token_affine", "float32", {"scale_offset": 2, "channel": width})
        add("token_scale", "float16", {"frame": frames, "token": tokens})
    else:
        add("tokens", "float16", token_axes)
    if spec.stores_maps:
        scale_axes = {"prev_next": 2, "pair": frames - 1, "query": tokens - 1}
        map_axes = scale_axes | {"key": tokens - 1}
        if spec.maps == "uint8":
            add("maps", "uint8", map_axes)
            add("map_scale", "float16", scale_axes)
        else:
            add("maps", "float16", map_axes)
    add("class_tokens", "float16", {"frame": frames, "channel": width})
    return out


def mark_path(cache_path: Path, block: int) -> Path:
    """Return where a block's done mark lies."""
    return cache_path / DONE_NAME / f"{block:06d}.json"


def mark_name(block: int) -> str:
    """Return the same as a manifest names it: relative to the cache."""
    return f"{DONE_NAME}/{block:06d}.json"


def redo_path(cache_path: Path, block: int) -> Path:
    """Return where it stands that a block with a mark is being redone: its files may be of two attempts."""
    return cache_path / DONE_NAME / f"{block:06d}{_REDO_SUFFIX}"


def is_in_redo(cache_path: Path, block: int) -> bool:
    """Whether a redo of a block was begun and not ended. Readers have what its old mark promises."""
    return is_there(redo_path(cache_path, block), follow_links=False)  # as a listing has it


def marked_blocks(cache_path: Path) -> set[int]:
    """Return the blocks that have a done mark, intact or not: one look at the directory for all of them.

    Raises: CacheError where the disk refuses: they are not taken for undone then.
    """
    return _blocks_named(cache_path, ".json")


def blocks_in_redo(cache_path: Path) -> set[int]:
    """Return the blocks whose redo was begun and not ended."""
    return _blocks_named(cache_path, _REDO_SUFFIX)


def finished_blocks(cache_path: Path) -> set[int]:
    """Return the blocks with which writers have nothing to do: marked, and not in the midst of a redo."""
    return marked_blocks(cache_path) - blocks_in_redo(cache_path)


def stored_blocks(cache_path: Path, spec: CacheSpec) -> set[int]:
    """Return the blocks of which any array has files, marked or not."""
    found = set[int]().union(*(layout.blocks_there(cache_path) for layout in array_layouts(spec).values()))
    return {block for block in found if block < spec.num_blocks}


def _blocks_named(cache_path: Path, suffix: str) -> set[int]:
    stems = [name.removesuffix(suffix) for name in names_in(cache_path / DONE_NAME) if name.endswith(suffix)]
    return {int(stem) for stem in stems if _BLOCK_NUMBER.fullmatch(stem)}


def as_range(positions: Sequence[int]) -> Sequence[int]:
    """Return evenly spaced ascending positions as a range, which is read faster; others as they are."""
    if not positions:
        return positions
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if step < 1:
        return positions
    evenly = range(positions[0], positions[-1] + 1, step)
    return evenly if list(evenly) == list(positions) else positions
