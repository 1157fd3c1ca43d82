"""The index, compared to the byte with the one that would be written of the marks, without writing that."""

import contextlib
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import is_there
from evl_cache.store.format.index import Index
from evl_cache.store.format.index_file import IndexFile
from evl_cache.store.format.index_head import INDEX_NAME, Table
from evl_cache.store.format.marks import Mark
from evl_cache.store.writing.index_files import IndexWriter


class IndexProof:
    """Compares the index of a cache, if it has one, with its marks, block by block. A cache needs none."""

    def __init__(self, cache_path: Path, spec: CacheSpec) -> None:
        self._path, self._spec, self._next = cache_path / INDEX_NAME, spec, 0
        self._as_written: _AsWritten | None = None
        self._writer: IndexWriter | None = None
        self._is_there = is_there(self._path, follow_links=False)
        if self._is_there:
            with contextlib.suppress(OSError, CacheError):  # `problem` tells
                self._as_written = _AsWritten(self._path)
                self._writer = IndexWriter(self._as_written, spec, first=0)

    def add(self, mark: Mark) -> None:
        """Compare a block, where it is the next one and all before it were the same."""
        if self._writer is None or self._as_written is None or mark.block != self._next:
            return
        try:
            self._writer.add(mark)
        except CacheError:  # not to be indexed; or the file cannot be read, which is damage like any other
            self._as_written.is_same = False
        self._next += 1
        if not self._as_written.is_same:
            self._writer = None

    def problem(self, cache_digest: str | None, labels: Table | None) -> str | None:
        """Return what is wrong with the index, and what to do; None where nothing is, or it is not there.

        Args:
            cache_digest: of the manifest, which agrees with all files; None where there is none such. What an index is
                of then is not known, and only whether it is intact.
            labels: of the clips; None where the list is damaged.
        """
        if not self._is_there:
            return None
        remedy = f"run evl-cache index {self._path.parent}, or repair the cache"
        try:
            found = Index(self._path, self._spec)
        except CacheDamaged as error:
            return str(error)
        except (OSError, CacheError) as error:
            return f"{self._path}: cannot be read as an index ({error}); {remedy}"
        if cache_digest is None or labels is None:
            return None
        if found.cache_digest != cache_digest:
            return f"{self._path}: is not the index of this manifest; {remedy}"
        if self._writer is not None and self._as_written is not None and self._next == self._spec.num_blocks:
            with contextlib.suppress(CacheError):
                self._writer.finish(cache_digest=cache_digest, labels=labels)
                if self._as_written.is_same and self._as_written.is_at_end():
                    return None
        return f"{self._path}: is not what the marks give; {remedy}"


class _AsWritten:
    """Takes what a writer would write, and compares it with a file that is there.

    Attributes:
        size: bytes that came.
        is_same: whether they were all those of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = IndexFile(path)
        self.size, self.is_same = 0, True

    def write(self, data: bytes) -> None:
        """Compare the next bytes. The first ones are a place for the head, which comes last."""
        if self.size:
            self._compare(data, self.size)
        self.size += len(data)

    def write_over(self, data: bytes) -> None:
        """Compare the head."""
        self._compare(data, 0)

    def is_at_end(self) -> bool:
        """Whether the file has no more than what came."""
        return self._file.size == self.size

    def _compare(self, data: bytes, start: int) -> None:
        is_inside = start + len(data) <= self._file.size
        self.is_same = self.is_same and is_inside and self._file.read(start, len(data)) == data
