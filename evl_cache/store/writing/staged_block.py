"""The files of one block before they have their names: what may happen to all of them at once does."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from evl_cache.store.disk.checksum import file_crc32c
from evl_cache.store.disk.directories import fsync_directory
from evl_cache.store.disk.publish import StagedFile
from evl_cache.store.disk.runtime import Runtime

Given = TypeVar("Given")
Found = TypeVar("Found")

_AT_ONCE = 8  # syncs of files and directories, most of which wait for the same write of the disk's journal


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
