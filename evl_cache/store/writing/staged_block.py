"""The files of one block before they have their names: what may happen to all of them at once does."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from evl_cache.store.disk.checksum import file_crc32c
from evl_cache.store.disk.directories import fsync_directory, make_directories
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.disk.publish import StagedFile, stage_file
from evl_cache.store.disk.runtime import Runtime
from evl_cache.store.format.layout import ArrayLayout
from evl_cache.store.writing.leftovers import remove_leftovers

Given = TypeVar("Given")
Found = TypeVar("Found")

_AT_ONCE = 8  # syncs of files and directories, most of which wait for the same write of the disk's journal


def stage_shard(cache_path: Path, layout: ArrayLayout, block: int, *, lock: BlockLock) -> StagedFile:
    """Open a new staged file for a block's shard of an array, after removing those that a dead job left for it.

    `lock`: of the block, held by this process. Raises: CacheError where the disk refuses; for a link.
    """
    directory = layout.shard(cache_path, block).parent
    check_no_links(cache_path, directory)
    # The publication syncs before the mark. A sync now would wait for the data of the blocks before.
    is_new = make_directories(directory, sync=False)
    # A directory of all blocks is not listed for each of them, only where a lock tells that a job died at this one.
    is_shared = layout.shards_share_directory
    if (lock.took_over if is_shared else not is_new) and lock.is_held():
        remove_leftovers(directory, block=block if is_shared else None)
    return stage_file(directory, block=block)


class StagedBlock:
    """Staged files by array. A context manager, which ends its threads; the files are the caller's to discard.

    Args:
        directories: on the way to the block's files; whoever made them, or gave a file its name, may have died since.
        runtime: gives the threads.
    """

    def __init__(
        self, files: Mapping[str, StagedFile], directories: Iterable[Path], runtime: Runtime
    ) -> None:
        self.files = files
        self._directories = directories
        self._threads = runtime.executor("sync", threads=_AT_ONCE)

    def seal(self) -> None:
        """End the files and make their bytes durable. Raises: CacheError."""
        self._each(StagedFile.seal, self.files.values())

    def sync_names(self) -> None:
        """Make the names in all directories durable. Raises: CacheError."""
        self._each(fsync_directory, self._directories)

    def lies_at(self, paths: Mapping[str, Path]) -> bool:
        """Whether paths, by array, lead to what was written. A CRC is enough against accidents, and ten times as fast.

        Raises: CacheError where one cannot be read.
        """
        found = self._each(file_crc32c, paths.values())
        return found == [(self.files[name].size, self.files[name].crc32c) for name in paths]

    def _each(self, function: Callable[[Given], Found], values: Iterable[Given]) -> list[Found]:
        return list(self._threads.map(function, values))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)
