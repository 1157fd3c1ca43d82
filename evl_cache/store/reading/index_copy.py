"""The index of a remote cache in the cache's copy: its head and tables at once, its rows as they are asked for.

The file has the size of the whole index, and holes where rows were not asked for yet. No list says which: a hole is a row
that does not match its checksum, as is a damaged one, and both are fetched. Several processes may fill one file: what
they write is the same.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged, CacheError, WaitEnded
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import disk_error, open_regular
from evl_cache.store.disk.forks import renew_in_children
from evl_cache.store.format.index import Fetch, Index, open_index
from evl_cache.store.format.index_head import (
    HEAD_NBYTES,
    INDEX_NAME,
    MOST_TEXTS_NBYTES,
    TABLES,
    check_sections,
    index_nbytes,
    parse_head,
    row_nbytes,
)
from evl_cache.store.objects.objects import Objects
from evl_cache.store.reading.attempts import ATTEMPTS, attempts
from evl_cache.store.reading.staged_files import staged_file

_WINDOW_NBYTES = 1 << 20  # of rows that one request brings


class IndexCopy:
    """The index of a remote cache, in a copy. Threads may share it.

    Args:
        objects: the remote cache's files.
        spec: what it holds.
        path: directory of the copy.
        count: called at each request for rows.
    """

    def __init__(
        self, objects: Objects, spec: CacheSpec, path: Path, *, count: Callable[[], None] = lambda: None
    ) -> None:
        self._objects, self._spec, self._copy, self._count = objects, spec, path, count
        self._path = path / INDEX_NAME
        self._url = f"{objects.url}/{INDEX_NAME}"
        self._head = b""
        self._rows = range(0)
        self._times_ended = 0
        self.renew()
        renew_in_children(self)

    def open(self, cache_digest: str, fetch: Fetch) -> Index | None:
        """Return the index with this cache digest, with its tables here; None where there is none, or none intact.

        Args:
            fetch: what gives it rows: `fetch` of this, or what calls it.

        Raises: CacheError where the server fails between head and tables, or the disk refuses.
        """
        index = open_index(self._copy, self._spec, fetch=fetch)
        if index is None or index.cache_digest != cache_digest:
            if not self._bring_tables(cache_digest):
                return None
            index = open_index(self._copy, self._spec, fetch=fetch)
        if index is None or index.cache_digest != cache_digest:
            return None
        self._head = index.head
        start, nbytes, _ = parse_head(self._head, self._spec, self._path)["sections"]["rows"]
        self._rows = range(start, start + nbytes)
        return index

    def fetch(self, start: int, nbytes: int, is_right: Callable[[bytes], bool]) -> bytes:
        """Return bytes of the index from the server, or from the copy where they came meanwhile. Neighbours come along.

        Raises: FileNotFoundError; CacheDamaged where they do not arrive as `is_right` wants them; CacheError.
        """
        times_ended = self._times_ended
        first, stop = self._window(start, nbytes)
        with self._locks.setdefault(first, threading.Lock()):  # for who waits here, another has fetched them
            if is_right(here := self._here(start, nbytes)):
                return here
            for _ in attempts():
                if self._times_ended != times_ended:  # while another was waited for who fetches the same
                    raise WaitEnded(f"{self._url}: no longer waited for")
                self._count()
                part = memoryview(self._objects.get_range(INDEX_NAME, first, stop - first))
                found = bytes(part[start - first : start - first + nbytes])
                if is_right(found):
                    self._keep(first, part)
                    return found
        raise CacheDamaged(f"{self._url}: bytes from {start} on arrive damaged, {ATTEMPTS} times")

    def end_waits(self) -> None:
        """Have whoever waits for another's request for the same bytes make none of his own; `Objects` ends that one."""
        self._times_ended += 1

    def _window(self, start: int, nbytes: int) -> tuple[int, int]:
        """Return where a request for bytes begins and ends: rows come many at a time, and always the same ones."""
        if start not in self._rows:
            return start, start + nbytes
        row = row_nbytes(self._spec)
        step = max(1, _WINDOW_NBYTES // row) * row
        first = start - (start - self._rows.start) % step
        return first, min(first + step, self._rows.stop)

    def _here(self, start: int, nbytes: int) -> bytes:
        with contextlib.suppress(OSError, CacheError), open_regular(self._path) as file:
            return os.pread(file.fileno(), nbytes, start)
        return b""

    def _keep(self, start: int, part: memoryview) -> None:
        """Put bytes into the file. What cannot be kept is fetched again when it is needed again."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                # Another version may have put its own index there, in which other things lie at this place.
                if os.pread(descriptor, HEAD_NBYTES, 0) == self._head:
                    while len(part):
                        count = os.pwrite(descriptor, part, start)
                        part, start = part[count:], start + count
            finally:
                os.close(descriptor)

    def _bring_tables(self, cache_digest: str) -> bool:
        """Fetch head and tables. Returns: whether the server has an intact index with this cache digest."""
        for _ in attempts():
            try:
                # Servers that hide what is not there answer as if it were forbidden: then marks tell.
                written = bytes(self._objects.get_range(INDEX_NAME, 0, HEAD_NBYTES))
            except WaitEnded:
                raise
            except (FileNotFoundError, CacheError):
                return False
            try:
                head = parse_head(written, self._spec, self._url)
                if head["cache_digest"] != cache_digest:
                    return False
                check_sections(head, self._spec, self._url)
                if head["sections"]["texts"][1] > MOST_TEXTS_NBYTES:
                    return False
                self._make_file(written, head)
                return True
            except CacheDamaged:
                continue
            except FileNotFoundError:
                return False
        return False

    def _make_file(self, written_head: bytes, head: Mapping[str, Any]) -> None:
        """Make the file, with holes but whole otherwise. Raises: CacheDamaged where what comes is not intact."""
        start, stop = head["sections"][TABLES][0], index_nbytes(head)
        tables = self._objects.get_range(INDEX_NAME, start, stop - start)
        try:
            with staged_file(self._path) as staged:
                with staged.open("xb") as file:
                    file.write(written_head)
                    file.truncate(start)
                    file.seek(start)
                    file.write(tables)
                Index(staged, self._spec)
        except OSError as error:
            raise disk_error("write", self._path, error) from error

    def renew(self) -> None:
        """Begin with no locks, in a forked child: one may be held by a thread that only the parent has."""
        self._locks: dict[int, threading.Lock] = {}
