"""The size that a cache will have, and whether the disk has room for it."""

import math
import shutil
from pathlib import Path

from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import files_below, is_there
from evl_cache.store.format.description import description_files
from evl_cache.store.format.layout import PROJECTIONS_NAME, array_layouts, marked_blocks
from evl_cache.store.format.limits import projections_nbytes

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


def size_on_disk(cache_path: Path) -> tuple[int, int]:
    """Return bytes and number of a cache's files, as they are found: other jobs may be at work."""
    sizes = [size for _, size in files_below(cache_path)]
    return sum(sizes), len(sizes)


def check_free_space(cache_path: Path, spec: CacheSpec) -> None:
    """Check that there is room for the blocks that are not done. Raises: CacheError saying how much is missing."""
    done = marked_blocks(cache_path)
    left = sum(
        len(spec.clips_of_block(block)) * spec.views.per_clip
        for block in range(spec.num_blocks)
        if block not in done
    )
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
