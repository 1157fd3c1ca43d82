"""Proof of an index: it is byte for byte what the marks give."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links, open_regular
from evl_cache.store.format.description import read_clips, read_description
from evl_cache.store.format.index_head import HEAD_NBYTES, INDEX_NAME
from evl_cache.store.format.marks import Mark
from evl_cache.store.writing.index_files import IndexWriter, NotIndexable

_REMEDY = "evl-cache index makes it again"


class IndexCheck:
    """Compares the index of a complete cache with its marks, which come one after another. A context manager.

    Raises: CacheError where the disk refuses.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec) -> None:
        self._cache_path, self._spec = cache_path, spec
        self._sink = _Comparing(cache_path / INDEX_NAME)
        self._writer = IndexWriter(self._sink, spec, first=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink.close()

    def add(self, mark: Mark) -> None:
        """Compare the next block."""
        with contextlib.suppress(NotIndexable):  # then it has fewer rows than there are blocks, and differs
            self._writer.add(mark)

    def problem(self, cache_digest: str) -> str | None:
        """Return what is wrong with the index, now that all blocks came; None where nothing is, or there is none."""
        path = self._cache_path / INDEX_NAME
        if not self._sink.is_there:
            return None
        with contextlib.suppress(CacheDamaged, NotIndexable):  # a damaged list of clips is told by itself
            labels = read_clips(self._cache_path, read_description(self._cache_path)).labels
            self._writer.finish(cache_digest=cache_digest, labels=labels)
        return None if self._sink.is_same else f"{path}: is not what the marks give; {_REMEDY}"


class _Comparing:
    """Compares with a file what would be written into it."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._is_same, self._head = True, b""
        self._file = None
        with contextlib.suppress(FileNotFoundError):
            check_no_links(path.parent, path)
            self._file = open_regular(path)
            self._head = self._file.read(HEAD_NBYTES)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def is_there(self) -> bool:
        return self._file is not None

    @property
    def is_same(self) -> bool:
        """Whether the file has all that came, and nothing else."""
        return self._is_same and self._file is not None and self._file.read(1) == b""

    def write(self, data: bytes) -> None:
        if self.size > 0 and self._file is not None and self._is_same:
            self._is_same = self._file.read(len(data)) == data
        self.size += len(data)

    def write_over(self, data: bytes) -> None:
        self._is_same = self._is_same and self._head == data
