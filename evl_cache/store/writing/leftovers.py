"""Staged files that jobs left which were killed: found by their names, and removed where no live writer has them."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import remove_leftover
from evl_cache.store.disk.publish import is_staging_name, staged_block
from evl_cache.store.format.layout import array_layouts


def staged_in(directory: Path) -> list[Path]:
    """Return the staged files in a directory; none where it cannot be listed."""
    with contextlib.suppress(OSError):
        return [directory / name for name in os.listdir(directory) if is_staging_name(name)]
    return []


def remove_staged(paths: Iterable[Path]) -> None:
    """Remove staged files, as far as the disk lets. The caller knows that their writers are dead."""
    for path in paths:
        remove_leftover(path)


def remove_leftovers(directory: Path, *, block: int | None = None) -> None:
    """Remove the staged files in a directory: all, or those of one block, which has no other live writer than the caller."""
    remove_staged(path for path in staged_in(directory) if block in (None, staged_block(path.name)))


class BlockLeftovers:
    """Removes what dead jobs staged, block by block; a directory that all blocks share is listed once, at the first."""

    def __init__(self, cache_path: Path, spec: CacheSpec) -> None:
        self._cache_path, self._layouts = cache_path, array_layouts(spec).values()
        self._staged: dict[Path, list[Path]] = {}

    def remove(self, block: int) -> None:
        """Remove the staged files of a block, whose lock the caller has."""
        for layout in self._layouts:
            directory = layout.shard(self._cache_path, block).parent
            if not layout.shards_share_directory:
                remove_leftovers(directory)
                continue
            if directory not in self._staged:
                self._staged[directory] = staged_in(directory)
            remove_staged(path for path in self._staged[directory] if staged_block(path.name) == block)
