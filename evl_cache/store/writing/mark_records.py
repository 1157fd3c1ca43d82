"""Other records of the clips of a block that is done; its features stay as they lie there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evl_cache.spec import CacheSpec
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.format.marks import ClipRecord, Mark
from evl_cache.store.writing.publication import BlockPublication, has_digest


def replace_records(
    cache_path: Path, spec: CacheSpec, mark: Mark, clips: Sequence[ClipRecord], *, lock: BlockLock
) -> bool:
    """Put a mark with these records in the place of a block's mark, and remove the manifest, which names the old one.

    Args:
        mark: of the block, read under the lock.
        clips: a record for each of its clips.

    Returns: False where the block's files are not those of its mark; then nothing is changed.
    Raises: BlockLost where another job holds the block now; CacheError where the disk refuses.
    """
    for name, layout in array_layouts(spec).items():
        if not has_digest(layout.shard(cache_path, mark.block), mark.files[name].digest):
            return False
    BlockPublication(cache_path, spec, mark.block, lock=lock).publish(replace(mark, clips=tuple(clips)), {})
    return True
