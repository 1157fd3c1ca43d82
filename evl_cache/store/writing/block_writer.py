"""Writing one block: rows in, shards and the done mark out, whole or not at all.

Order of a commit: every shard's data and fsync, its name (never replacing), fsync of its directory; then a
second look at what lies there; then the mark; and a third look where the lock was lost meanwhile. See docs/cache-format.md.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

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
    write_json_atomic,
)
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import MANIFEST_NAME, ArrayLayout, array_layouts, mark_path
from evl_cache.store.format.marks import ClipRecord, FileRecord, Mark, mark_document, read_mark
from evl_cache.store.format.rows import Row
from evl_cache.store.shards.codec import scratch
from evl_cache.store.shards.shard import ShardWriter
from evl_cache.store.writing.finish import remove_leftovers

ROWS_IN_FLIGHT = 8  # rows being compressed or waiting for the disk: what bounds the memory of a block


class BlockLost(CacheError):
    """Another job took the block over while this one was paused: its work counts, this one's is dropped."""


class BlockWriter:
    """Takes the rows of a block in order, compresses them in threads, and commits. Always `close` it.

    Args:
        root: the cache. spec: its spec. block: number. lock: held by this process for the block.
        encoders: threads that compress; shared by blocks. runtime: gives the thread that appends.
    """

    def __init__(
        self,
        root: Path,
        spec: CacheSpec,
        block: int,
        *,
        lock: BlockLock,
        encoders: Executor,
        runtime: Runtime = REAL,
    ) -> None:
        self.root, self.spec, self.block = root, spec, block
        self._lock, self._encoders = lock, encoders
        self._layouts = array_layouts(spec)
        self._staged: dict[str, StagedFile] = {}
        self._writers: dict[str, ShardWriter] = {}
        self._mark_before = file_identity(mark_path(root, block))
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
        records = {name: FileRecord.of(writer.close()) for name, writer in self._writers.items()}
        mark = Mark(block=self.block, files=records, clips=tuple(clips), environment=environment)
        self._check_lock()
        try:
            return self._publish_block(mark)
        except CacheError as error:
            # What fails after a takeover fails because of it; and a job that wakes believing in its lock removes what
            # the one that has the lock now has staged, as a leftover.
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
        directory = layout.shard(self.root, self.block).parent
        check_no_links(self.root, directory)
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
        clear_mark(self.root, self.spec, self.block, unless=mark.files, before_each=self._check_lock)
        for name, layout in self._layouts.items():
            # A taken name: left by a job that died before its mark, or by one that took the block over.
            with contextlib.suppress(AlreadyPublished):
                self._staged[name].publish(layout.shard(self.root, self.block))
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
        document, path = mark_document(mark, self.spec), mark_path(self.root, self.block)
        try:
            write_json_atomic(path, document, replace=False)
        except AlreadyPublished:
            found = valid_mark(self.root, self.spec, self.block)
            if found is not None and found.files == dict(mark.files):
                return found
            if not self._lies_there(mark.files):
                raise self._lost() from None
            write_json_atomic(path, document, replace=True)
        written = valid_mark(self.root, self.spec, self.block)
        if written is None:
            raise self._lost()
        return written

    def _is_done_meanwhile(self) -> bool:
        """By the job that had the block before: it was paused, woke, and had little left to do."""
        if file_identity(mark_path(self.root, self.block)) in (None, self._mark_before):
            return False
        found = valid_mark(self.root, self.spec, self.block)
        return found is not None and self._lies_there(found.files)

    def _withdraw_if_broken(self) -> None:
        """After changes without the lock: a mark whose files are not those it names goes, and this job redoes the block.

        It may be another job's, which believes the block done.
        """
        found = valid_mark(self.root, self.spec, self.block)
        if found is not None and not self._lies_there(found.files):
            _unlink_mark(self.root, self.block)

    def _written_lies_there(self) -> bool:
        """Whether the names lead to what was written: by CRC, since no one means harm here (docs/architecture.md)."""
        try:
            return all(
                file_crc32c(layout.shard(self.root, self.block))
                == (self._staged[name].size, self._staged[name].crc32c)
                for name, layout in self._layouts.items()
            )
        except CacheError:
            return False

    def _lies_there(self, records: Mapping[str, FileRecord]) -> bool:
        try:
            return all(
                file_digest(layout.shard(self.root, self.block)) == (records[name].size, records[name].sha256)
                for name, layout in self._layouts.items()
            )
        except CacheError:
            return False

    def _check_lock(self) -> None:
        if not self._lock.is_held():
            raise self._lost()

    def _lost(self) -> BlockLost:
        return BlockLost(
            f"{self.root}: block {self.block} was taken over by another job; run the same command again"
        )


def clear_mark(
    root: Path,
    spec: CacheSpec,
    block: int,
    *,
    unless: Mapping[str, FileRecord] | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Make a block not exist: its mark goes first, then its files. Nothing is done where files are `unless`.

    A file whose bytes are those about to be published stays, so that open readers see no change.
    before_each: called before each change; what it raises ends it.
    """
    _unlink_mark(root, block, before_each=before_each)
    for name, layout in array_layouts(spec).items():
        path = layout.shard(root, block)
        check_no_links(root, path.parent)
        if not path.exists():
            continue
        if unless is None or file_digest(path) != (unless[name].size, unless[name].sha256):
            before_each()
            path.unlink(missing_ok=True)


def _unlink_mark(root: Path, block: int, *, before_each: Callable[[], None] = lambda: None) -> None:
    # The manifest names the mark, and the mark the files: each is gone for good before what it names.
    for path in (root / MANIFEST_NAME, mark_path(root, block)):
        check_no_links(root, path.parent)
        if path.exists():
            before_each()
            path.unlink(missing_ok=True)
            fsync_directory(path.parent)


def valid_mark(root: Path, spec: CacheSpec, block: int) -> Mark | None:
    """The block's mark where it is intact; None otherwise."""
    try:
        return read_mark(root, block, spec)
    except CacheDamaged:
        return None


def _encode(layout: ArrayLayout, chunk: np.ndarray[Any, Any]) -> bytes:
    if not layout.differenced:
        return layout.codec.encode(chunk)
    differences = scratch(chunk.nbytes).view(chunk.dtype).reshape(chunk.shape)
    frame_difference(chunk, out=differences)
    return layout.codec.encode(differences)
