"""Writing one block: rows in, shards and the done mark out, whole or not at all.

Order of a commit: every shard's data and fsync, its name (never replacing), fsync of its directory. Then a second
look at what lies there, then the mark, and a third look where the lock was lost meanwhile. See docs/cache-format.md.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.quantize import frame_difference
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import file_crc32c, file_digest
from evl_cache.store.disk.file_system import check_no_links, file_identity
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.disk.publish import (
    AlreadyPublished,
    StagedFile,
    fsync_directory,
    make_directories,
    stage_file,
    write_atomic,
)
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import MANIFEST_NAME, ArrayLayout, array_layouts, mark_path
from evl_cache.store.format.marks import ClipRecord, Mark, ShardFiles, mark_document, read_mark
from evl_cache.store.format.rows import Row
from evl_cache.store.shards.codec import scratch
from evl_cache.store.shards.shard import ShardWriter
from evl_cache.store.writing.finish import remove_leftovers

ROWS_IN_FLIGHT = 8  # rows being compressed or waiting for the disk: what bounds the memory of a block


class BlockLost(CacheError):
    """Another job took the block over while this one was paused: that job's work counts, this one's is dropped."""


class BlockWriter:
    """Takes the rows of a block in order, compresses them in threads, and commits. Always `close` it.

    Args:
        lock: the block's lock, held by this process.
        encoders: threads that compress, shared by blocks.
        runtime: gives the thread that appends.
    """

    def __init__(
        self,
        cache_path: Path,
        spec: CacheSpec,
        block: int,
        *,
        lock: BlockLock,
        encoders: Executor,
        runtime: Runtime = REAL,
    ) -> None:
        self.cache_path, self.spec, self.block = cache_path, spec, block
        self._lock, self._encoders = lock, encoders
        self._layouts = array_layouts(spec)
        self._staged: dict[str, StagedFile] = {}
        self._writers: dict[str, ShardWriter] = {}
        self._mark_before = file_identity(mark_path(cache_path, block))
        self._appender = runtime.executor("append")
        self._slots = threading.BoundedSemaphore(ROWS_IN_FLIGHT)
        self._failure: BaseException | None = None
        try:
            for name, layout in self._layouts.items():
                self._open(name, layout)
        except BaseException:
            self.close()
            raise

    def append(self, row: Row | None) -> None:
        """Hand over the next sample's row (None: its clip failed). Returns at once unless too many wait.

        Raises: what went wrong with an earlier row.
        """
        self._raise_failure()
        self._slots.acquire()
        encoded: dict[str, list[Future[bytes]]] = {}
        if row is not None:
            for name, layout in self._layouts.items():
                encoded[name] = [self._encoders.submit(_encode, layout, chunk) for chunk in row[name]]
        self._appender.submit(self._append_encoded, encoded)

    def commit(self, clips: Sequence[ClipRecord], environment: Mapping[str, Any]) -> Mark:
        """Publish the block and its mark.

        Returns: the mark that stands: this one, or an equal block's that another job finished meanwhile.
        Raises: BlockLost where another job holds the block now; CacheError where the disk refuses.
        """
        self._appender.shutdown(wait=True)
        self._raise_failure()
        records = {name: writer.close() for name, writer in self._writers.items()}
        mark = Mark(block=self.block, files=records, clips=tuple(clips), environment=environment)
        self._check_lock()
        try:
            return self._publish_block(mark)
        except CacheError as error:
            # What fails after a takeover fails because of it. And a job that was paused, and still believes that it
            # has the lock, takes for a leftover what the job that has it now has staged, and removes it.
            is_held = self._lock.is_held()
            if is_held and not isinstance(error.__cause__, FileNotFoundError):
                raise
            if not is_held:
                self._withdraw_if_broken()
            raise self._lost() from error

    def close(self) -> None:
        """Stop the threads and remove what was not published."""
        self._appender.shutdown(wait=True, cancel_futures=True)
        for staged in self._staged.values():
            staged.discard()

    def _open(self, name: str, layout: ArrayLayout) -> None:
        directory = layout.shard(self.cache_path, self.block).parent
        check_no_links(self.cache_path, directory)
        make_directories(directory)
        if self._lock.is_held():
            remove_leftovers(directory)
        self._staged[name] = stage_file(directory)
        grid = (self.spec.block_samples, len(self.spec.stored_layers))
        self._writers[name] = ShardWriter(self._staged[name], grid=grid, codec=layout.codec)

    def _append_encoded(self, encoded: Mapping[str, Sequence[Future[bytes]]]) -> None:
        try:
            for name, writer in self._writers.items():
                for layer in range(len(self.spec.stored_layers)):
                    writer.append_encoded(encoded[name][layer].result() if encoded else None)
        except BaseException as error:  # kept for the thread that owns the block
            self._failure = self._failure or error
        finally:
            self._slots.release()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _publish_block(self, mark: Mark) -> Mark:
        if self._is_done_meanwhile():
            raise self._lost()
        # --retry-failed and repair redo a marked block: it does not exist while its files change.
        clear_mark(self.cache_path, self.spec, self.block, unless=mark.files, before_each=self._check_lock)
        for name, layout in self._layouts.items():
            # A taken name: left by a job that died before its mark, or by one that took the block over.
            with contextlib.suppress(AlreadyPublished):
                self._staged[name].publish(layout.shard(self.cache_path, self.block))
        if not self._written_lies_there():
            raise self._lost()
        self._check_lock()
        found = self._publish_mark(mark)
        # Whoever took the block over before this look may have changed its files after the look above; whoever
        # takes it over from now on finds the mark.
        if not self._lock.is_held() and not self._lies_there(found.files):
            raise self._lost()
        return found

    def _publish_mark(self, mark: Mark) -> Mark:
        content = canonical_json(mark_document(mark, self.spec))
        path = mark_path(self.cache_path, self.block)
        try:
            write_atomic(path, content, replace=False)
        except AlreadyPublished:
            found = valid_mark(self.cache_path, self.spec, self.block)
            if found is not None and found.files == dict(mark.files):
                return found
            if not self._lies_there(mark.files):
                raise self._lost() from None
            write_atomic(path, content)
        written = valid_mark(self.cache_path, self.spec, self.block)
        if written is None:
            raise self._lost()
        return written

    def _is_done_meanwhile(self) -> bool:
        """Whether the job that had this block before finished it: it was paused, woke, and had little left to do."""
        if file_identity(mark_path(self.cache_path, self.block)) in (None, self._mark_before):
            return False
        found = valid_mark(self.cache_path, self.spec, self.block)
        return found is not None and self._lies_there(found.files)

    def _withdraw_if_broken(self) -> None:
        """Remove a mark whose files are not those it names: this job may have changed them without the lock.

        The mark may be another job's, which believes the block done.
        """
        found = valid_mark(self.cache_path, self.spec, self.block)
        if found is not None and not self._lies_there(found.files):
            _unlink_mark(self.cache_path, self.block)

    def _written_lies_there(self) -> bool:
        """Whether the names lead to what was written. A CRC is enough against accidents, and ten times as fast."""
        try:
            return all(
                file_crc32c(layout.shard(self.cache_path, self.block))
                == (self._staged[name].size, self._staged[name].crc32c)
                for name, layout in self._layouts.items()
            )
        except CacheError:
            return False

    def _lies_there(self, records: ShardFiles) -> bool:
        """Whether the names lead to the files of a mark."""
        try:
            return all(
                file_digest(layout.shard(self.cache_path, self.block)) == records[name].digest
                for name, layout in self._layouts.items()
            )
        except CacheError:
            return False

    def _check_lock(self) -> None:
        if not self._lock.is_held():
            raise self._lost()

    def _lost(self) -> BlockLost:
        return BlockLost(
            f"{self.cache_path}: block {self.block} was taken over by another job; run the same command again"
        )


def clear_mark(
    cache_path: Path,
    spec: CacheSpec,
    block: int,
    *,
    unless: ShardFiles | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Make a block not exist: its mark goes first, then its files.

    Args:
        unless: files that are about to be published. One that is there already stays, so that open readers see no
            change.
        before_each: called before each change; what it raises ends the work.
    """
    _unlink_mark(cache_path, block, before_each=before_each)
    for name, layout in array_layouts(spec).items():
        path = layout.shard(cache_path, block)
        check_no_links(cache_path, path.parent)
        if not path.exists():
            continue
        if unless is None or file_digest(path) != unless[name].digest:
            before_each()
            path.unlink(missing_ok=True)


def _unlink_mark(cache_path: Path, block: int, *, before_each: Callable[[], None] = lambda: None) -> None:
    # The manifest names the mark, and the mark the files: each is gone for good before what it names.
    for path in (cache_path / MANIFEST_NAME, mark_path(cache_path, block)):
        check_no_links(cache_path, path.parent)
        if path.exists():
            before_each()
            path.unlink(missing_ok=True)
            fsync_directory(path.parent)


def valid_mark(cache_path: Path, spec: CacheSpec, block: int) -> Mark | None:
    """Return a block's mark where it is intact; None otherwise."""
    try:
        return read_mark(cache_path, block, spec)
    except CacheDamaged:
        return None


def _encode(layout: ArrayLayout, chunk: np.ndarray[Any, Any]) -> bytes:
    if not layout.differenced:
        return layout.codec.encode(chunk)
    differences = scratch(chunk.nbytes).view(chunk.dtype).reshape(chunk.shape)
    frame_difference(chunk, out=differences)
    return layout.codec.encode(differences)
