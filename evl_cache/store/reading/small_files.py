"""The small files of a cache on a server, brought into a directory as they lie there: all but the shards.

What is not as the manifest names it may have been damaged on its way: it is asked for again, and taken for what lies there
once it arrives so twice. Damage on the way is no damage of the cache.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.disk.file_system import disk_error
from evl_cache.store.format.description import description_files, parse_description
from evl_cache.store.format.grown import GROWN_NAME, MOST_GROWN_NBYTES, SECOND_COPY_NAME
from evl_cache.store.format.index import Index
from evl_cache.store.format.index_head import (
    HEAD_NBYTES,
    INDEX_NAME,
    check_sections,
    index_nbytes,
    parse_head,
)
from evl_cache.store.format.layout import DONE_NAME, MANIFEST_NAME, RECOVERY_NAME, mark_name, redo_path
from evl_cache.store.format.limits import (
    MOST_CLIPS_NBYTES,
    MOST_DESCRIPTION_NBYTES,
    file_limit,
    manifest_limit,
    mark_limit,
)
from evl_cache.store.format.manifest import proved_digest
from evl_cache.store.objects.objects import Objects
from evl_cache.store.objects.workers import Workers
from evl_cache.store.reading.attempts import attempts
from evl_cache.store.shards.metadata import METADATA_NAME

_PART_NBYTES = 8 << 20
# Blocks one after another that have no mark and are named nowhere, and none is asked for behind them: a stranger's
# description may claim a hundred million.
_MOST_ABSENT = 1000
_ROW = re.compile(rb'"([^"\\]+)":\{"sha256":"([0-9a-f]{64})","size":([0-9]{1,20})\}')


class SmallFiles:
    """Brings the small files of one cache.

    Args:
        objects: its files on the server.
        root: the directory; those of an addition come into one of its own.

    Attributes:
        objects: the same.
        manifest: as it was brought; None where there is none.
    """

    def __init__(self, objects: Objects, root: Path) -> None:
        self.objects, self._root = objects, root
        self._named: dict[str, tuple[int, str]] = {}
        self.manifest: bytes | None = None

    def bring(self, threads: int, on_progress: Callable[[str, int, int], None]) -> None:
        """Bring all.

        Args:
            threads: requests at a time.
            on_progress: called with `marks`, how many were asked for, and how many there may be.

        Raises: CacheError where the server fails, or the disk refuses.
        """
        _make_directory(self._root)
        spec = self._bring_group()
        if spec is None:
            self._bring(RECOVERY_NAME, MOST_CLIPS_NBYTES)
            return
        self.manifest = self._bring_manifest(spec)
        for name in description_files(spec):
            self._bring(name, file_limit(name, spec))
        for name in (GROWN_NAME, SECOND_COPY_NAME):
            self._bring(name, MOST_GROWN_NBYTES)
        with Workers(threads, self.objects) as workers:
            self._bring_marks(spec, workers, on_progress)
        self._bring_index(spec)

    def is_unchanged(self, spec: CacheSpec) -> bool:
        """Whether the manifest on the server is still the one that was brought."""
        before = None if self.manifest is None else content_digest(self.manifest)
        return self._arriving(MANIFEST_NAME, manifest_limit(spec), before) == self.manifest

    def _bring_group(self) -> CacheSpec | None:
        """Bring what the cache says of itself, and return what it holds; None where that cannot be told."""
        written = self._arriving(METADATA_NAME, MOST_DESCRIPTION_NBYTES, None)
        if written is None:
            return None
        self._write(METADATA_NAME, written)
        with contextlib.suppress(CacheDamaged):  # the proof tells
            return parse_description(written, f"{self.objects.url}/{METADATA_NAME}").spec
        return None

    def _bring_manifest(self, spec: CacheSpec) -> bytes | None:
        written: bytes | None = None
        for _ in attempts():
            before, written = written, self._get(MANIFEST_NAME, manifest_limit(spec))
            if written is None or written == before or proved_digest([written], spec) is not None:
                break
        if written is not None:
            self._write(MANIFEST_NAME, written)
            kept = {*description_files(spec)}
            for name, sha256, size in (found.groups() for found in _ROW.finditer(written)):
                if name.startswith(f"{DONE_NAME}/".encode()) or name.decode(errors="replace") in kept:
                    self._named[name.decode(errors="replace")] = int(size), sha256.decode()
        return written

    def _bring_marks(
        self, spec: CacheSpec, workers: Workers, on_progress: Callable[[str, int, int], None]
    ) -> None:
        def bring(block: int) -> bool:
            if self.manifest is None:  # it goes before a block is done again
                self._bring(redo_path(Path(), block).as_posix(), mark_limit(spec))
            return self._bring(mark_name(block), mark_limit(spec))

        _make_directory(self._root / DONE_NAME)
        absent = 0
        for block, is_there in enumerate(workers.each(bring, range(spec.num_blocks))):
            absent = 0 if is_there or mark_name(block) in self._named else absent + 1
            on_progress("marks", block + 1, spec.num_blocks)
            if absent >= _MOST_ABSENT and not self._named:
                return

    def _bring_index(self, spec: CacheSpec) -> None:
        """Bring the index, as far as its head says that it goes, and one byte more to see whether it ends there."""
        path, before = self._root / INDEX_NAME, ""
        for _ in attempts():
            parts = self._index_parts(spec)
            if (digest := _write_parts(path, parts)) is None:
                return
            if digest == before or _is_intact(path, spec):
                return
            before = digest

    def _index_parts(self, spec: CacheSpec) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError):
            head = bytes(self.objects.get_range(INDEX_NAME, 0, HEAD_NBYTES))
            yield head
            with contextlib.suppress(CacheDamaged):  # then the head is all that is looked at
                fields = parse_head(head, spec, INDEX_NAME)
                check_sections(fields, spec, INDEX_NAME)
                at, stop = len(head), index_nbytes(fields) + 1
                while at < stop:
                    part = bytes(self.objects.get_range(INDEX_NAME, at, min(_PART_NBYTES, stop - at)))
                    if not part:
                        return
                    at += len(part)
                    yield part

    def _bring(self, name: str, most_nbytes: int) -> bool:
        """Bring a file. Returns: whether it is there."""
        written = self._arriving(name, most_nbytes, self._named.get(name))
        if written is not None:
            self._write(name, written)
        return written is not None

    def _arriving(self, name: str, most_nbytes: int, expected: tuple[int, str] | None) -> bytes | None:
        """Return a file's bytes; None where there is none."""
        written: bytes | None = None
        for _ in attempts():
            before, written = written, self._get(name, most_nbytes)
            if written is None or written == before or content_digest(written) == expected:
                break
        return written

    def _get(self, name: str, most_nbytes: int) -> bytes | None:
        try:
            return self.objects.get(name, most_nbytes=most_nbytes)
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        path = self._root / name
        _make_directory(path.parent)
        _write_parts(path, [content])


def _is_intact(path: Path, spec: CacheSpec) -> bool:
    with contextlib.suppress(CacheDamaged):
        index = Index(path, spec)
        for block in range(index.first, index.stop):
            index.row(block)
        return True
    return False


def _write_parts(path: Path, parts: Iterable[bytes]) -> str | None:
    """Write a file of what comes. Returns: its sha256; None where nothing comes, and no file is written."""
    own, file = hashlib.sha256(), None
    try:
        for part in parts:
            file = file or path.open("wb")
            file.write(part)
            own.update(part)
    except OSError as error:
        raise disk_error("write", path, error) from error
    finally:
        if file is not None:
            file.close()
    return None if file is None else own.hexdigest()


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error("make", path, error) from error
