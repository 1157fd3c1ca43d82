"""The size that a cache has and will have, and whether the disk has room for it."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import is_there
from evl_cache.store.format.description import description_files
from evl_cache.store.format.index import Index, believed_index
from evl_cache.store.format.known_blocks import KnownBlocks
from evl_cache.store.format.layout import PROJECTIONS_NAME, array_layouts, mark_name, marked_blocks
from evl_cache.store.format.limits import projections_nbytes
from evl_cache.store.format.manifest import Manifest, manifest_at
from evl_cache.store.objects.address import is_url

# Stored bytes over decoded bytes, measured on real clips (docs/rate-distortion.md). Rounded up: a full disk costs more
# than a warning too many.
_STORED_SHARE = {
    ("default", "int8"): 0.85,
    ("default", "uint8"): 0.75,
    ("archive", "int8"): 0.82,
    ("archive", "uint8"): 0.70,
}
_MARK_BYTES_A_SAMPLE = 600  # of JSON: checksums of each chunk, and the clip's record


def sample_nbytes(spec: CacheSpec) -> tuple[int, int]:
    """Return the bytes of one sample, all layers: before the codec, and as expected after it."""
    raw, stored = 0, 0.0
    for layout in array_layouts(spec).values():
        nbytes = layout.chunk_nbytes * len(spec.stored_layers)
        raw += nbytes
        stored += nbytes * _STORED_SHARE.get((spec.codec, layout.dtype), 1.0)
    return raw, math.ceil(stored) + _MARK_BYTES_A_SAMPLE


def num_files(spec: CacheSpec) -> int:
    """Return the number of files of the complete cache: shards, marks, what describes it, and the manifest."""
    return spec.num_blocks * (len(array_layouts(spec)) + 1) + len(description_files(spec)) + 1


class CacheSize(NamedTuple):
    """The files that belong to a cache: those that its manifest names, or will name once all blocks are done.

    They describe it, or are marks and shards of blocks that are done. The manifest, index, locks and card are not counted.

    Attributes:
        nbytes, files: of all of them.
        shard_nbytes: of the shards alone.
        blocks_done: blocks that have a mark.
        cache_digest: the manifest's; None where it has no intact one.
    """

    nbytes: int
    files: int
    shard_nbytes: int
    blocks_done: int
    cache_digest: str | None


def cache_size(place: str | Path, spec: CacheSpec) -> CacheSize:
    """Return what belongs to the cache at a path or URL, without a look at each file where index or manifest tells.

    Of an unfinished one sizes are as found: other jobs may be at work, and what vanishes during the look is left out.
    Raises: CacheError where it cannot be read.
    """
    if not is_url(place):
        index = believed_index(Path(place), spec)
        if index is not None:
            return _by_index(Path(place), spec, index)
    manifest = manifest_at(place, spec)
    if manifest is not None:
        return size_by_manifest(spec, manifest)
    return CacheSize(0, 0, 0, 0, None) if is_url(place) else _by_looking(Path(place), spec)


def _by_index(cache_path: Path, spec: CacheSpec, index: Index) -> CacheSize:
    described = _sizes_of(cache_path, description_files(spec))
    return CacheSize(
        nbytes=index.nbytes + int(index.marks["size"].sum()) + sum(described),
        files=len(described) + spec.num_blocks * (1 + len(array_layouts(spec))),
        shard_nbytes=index.nbytes,
        blocks_done=spec.num_blocks,
        cache_digest=index.cache_digest,
    )


def size_by_manifest(spec: CacheSpec, manifest: Manifest) -> CacheSize:
    """Return what belongs to a complete cache."""
    arrays, described = array_layouts(spec).keys(), set(description_files(spec))
    shards = sum(
        size
        for name, (size, _) in manifest.files.items()
        if name.partition("/")[0] in arrays and name not in described
    )
    return CacheSize(
        nbytes=sum(size for size, _ in manifest.files.values()),
        files=len(manifest.files),
        shard_nbytes=shards,
        blocks_done=spec.num_blocks,
        cache_digest=manifest.digest,
    )


def _by_looking(cache_path: Path, spec: CacheSpec) -> CacheSize:
    blocks = [block for block in marked_blocks(cache_path) if block < spec.num_blocks]
    layouts, known = array_layouts(spec).values(), KnownBlocks(cache_path, spec)
    shards = marks = files = 0
    unknown: list[int] = []
    for block in blocks:
        if (index := known.covering(block)) is None:
            unknown.append(block)
            continue
        row = index.marks[block - index.first]
        shards, marks, files = shards + int(row["nbytes"]), marks + int(row["size"]), files + 1 + len(layouts)
    found = _sizes_of(cache_path, (layout.shard_name(block) for layout in layouts for block in unknown))
    others = _sizes_of(cache_path, [*description_files(spec), *map(mark_name, unknown)])
    return CacheSize(
        nbytes=shards + marks + sum(found) + sum(others),
        files=files + len(found) + len(others),
        shard_nbytes=shards + sum(found),
        blocks_done=len(blocks),
        cache_digest=None,
    )


def _sizes_of(cache_path: Path, names: Iterable[str]) -> list[int]:
    """Return the sizes of those of the files that are there; where a directory has several, they are found by a listing."""
    together: dict[str, set[str]] = {}
    for name in names:
        directory, _, own = name.rpartition("/")
        together.setdefault(directory, set()).add(own)
    found: list[int] = []
    for directory, own_names in together.items():
        with contextlib.suppress(OSError):
            if len(own_names) == 1:
                found.append((cache_path / directory / own_names.pop()).stat(follow_symlinks=False).st_size)
                continue
            with os.scandir(cache_path / directory) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        if entry.name in own_names:
                            found.append(entry.stat(follow_symlinks=False).st_size)
    return found


def check_free_space(cache_path: Path, spec: CacheSpec) -> None:
    """Check that there is room for the blocks that are not done. Raises: CacheError saying how much is missing."""
    last = spec.num_blocks - 1
    done = {block for block in marked_blocks(cache_path) if block <= last}
    left_out = (
        spec.num_blocks * spec.block_clips - spec.num_clips
    )  # clips that the last block has less than others
    clips_done = len(done) * spec.block_clips - (left_out if last in done else 0)
    left = (spec.num_clips - clips_done) * spec.views.per_clip
    needed = left * sample_nbytes(spec)[1]
    if not (cache_path / PROJECTIONS_NAME).exists():
        needed += projections_nbytes(spec)
    existing = cache_path
    while not is_there(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        total, _, free = shutil.disk_usage(existing)
    except OSError:
        return  # a disk that does not tell how much is free
    if total == 0:
        return  # nor does this one
    if needed > free:
        raise CacheError(
            f"{cache_path}: {left} samples need about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free, "
            f"{(needed - free) / 1e9:.2f} GB are missing; free space, or use another disk, fewer --layers or --maps none"
        )
