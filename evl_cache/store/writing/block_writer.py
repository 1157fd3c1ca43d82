"""Writing one block: rows in, shards and the done mark out, whole or not at all. `publication` gives them their names."""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.quantize import frame_difference
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.disk.publish import StagedFile, stage_file
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import ArrayLayout, array_layouts
from evl_cache.store.format.marks import ClipRecord, Mark
from evl_cache.store.format.rows import Row
from evl_cache.store.shards.codec import EncodedChunk, scratch
from evl_cache.store.shards.shard import ShardWriter
from evl_cache.store.writing.finish import remove_leftovers
from evl_cache.store.writing.publication import BlockPublication
from evl_cache.store.writing.stored_rows import StoredRow

ROWS_IN_FLIGHT = 16  # rows being compressed or waiting for the disk: what bounds the memory of a block
_SMALL_NBYTES = (
    1 << 16
)  # arrays of smaller chunks are compressed by one task, and share a thread that appends

# An array's name, its next chunk as it is stored (None: missing), and its checksum where it is known.
_NextChunk = tuple[str, bytes | None, int | None]


@dataclass
class _Appender:
    """A thread that appends to the shards of some arrays, rows in order; `room` is for rows that wait."""

    names: Sequence[str]
    thread: Executor
    room: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(ROWS_IN_FLIGHT)
    )


class BlockWriter:
    """Takes the rows of a block in order, compresses them in threads, and commits. Always `close` it.

    Each large array has a thread that appends, so that digests and writes of arrays run side by side.

    Args:
        lock: the block's lock, held by this process.
        encoders: threads that compress, shared by blocks.
        runtime: gives the threads that append and sync.
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
        self._unsynced: dict[Path, None] = {}
        self._publication = BlockPublication(cache_path, spec, block, lock=lock, runtime=runtime)
        large = [name for name, layout in self._layouts.items() if _chunk_nbytes(layout) >= _SMALL_NBYTES]
        small = [name for name in self._layouts if name not in large]
        self._appenders = [
            _Appender(names, runtime.executor("append"))
            for names in [*([name] for name in large), small]
            if names
        ]
        self._failure: BaseException | None = None
        self._is_closed = False
        try:
            for name, layout in self._layouts.items():
                self._open(name, layout)
        except BaseException:
            self.close()
            raise

    def append(self, row: Row | None) -> None:
        """Hand over the next sample's row (None: its clip failed). Returns at once unless too many wait.

        Arrays are read until they are compressed; of an array (L, *chunk), each layer should be contiguous.

        Raises: what went wrong with an earlier row; UsageError where the writer is closed.
        """
        self._wait_for_room()
        try:
            for appender in self._appenders:
                if row is None:
                    self._submit(appender, self._missing(appender.names))
                else:
                    self._submit(appender, _results(self._encoding(appender.names, row)))
        except BaseException as error:  # the row may be in some arrays and not in others
            self._note(error)
            raise

    def append_stored(self, row: StoredRow) -> None:
        """Hand over the next sample's row as it lies in a file of this block. Waits and raises as `append`."""
        self._wait_for_room()
        for appender in self._appenders:
            self._submit(appender, [(name, chunk, None) for name in appender.names for chunk in row[name]])

    def commit(self, clips: Sequence[ClipRecord], environment: Mapping[str, Any]) -> Mark:
        """Publish the block and its mark.

        Returns: the mark that stands: this one, or an equal block's that another job finished meanwhile.
        Raises: RowsAtStake where the block has features that would be lost; BlockLost where another job holds the
            block now; CacheError where the disk refuses.
        """
        for appender in self._appenders:
            appender.thread.shutdown(wait=True)
        self._raise_failure()
        records = {name: writer.close() for name, writer in self._writers.items()}
        mark = Mark(block=self.block, files=records, clips=tuple(clips), environment=environment)
        return self._publication.publish(mark, self._staged, unsynced=self._unsynced)

    def close(self) -> None:
        """Stop the threads and remove what was not published. Who waits in `append` gets an error."""
        self._is_closed = True
        for appender in self._appenders:
            appender.thread.shutdown(wait=True, cancel_futures=True)
        for staged in self._staged.values():
            staged.discard()

    def _open(self, name: str, layout: ArrayLayout) -> None:
        directory = layout.shard(self.cache_path, self.block).parent
        check_no_links(self.cache_path, directory)
        # What all blocks share is durable before any of them writes. A block's own directories need not be before its
        # mark is, and a sync now would wait for the data of the blocks before; those that a job left that died may not
        # have been synced either.
        shared = self.cache_path / name / directory.relative_to(self.cache_path / name).parts[0]
        make_directories(shared)
        is_new = make_directories(directory, sync=False)
        own = (parent for parent in directory.parents if parent.is_relative_to(shared))
        self._unsynced |= dict.fromkeys(own)
        if not is_new and self._lock.is_held():
            remove_leftovers(directory)
        self._staged[name] = stage_file(directory)
        grid = (self.spec.block_samples, len(self.spec.stored_layers))
        self._writers[name] = ShardWriter(self._staged[name], grid=grid, codec=layout.codec)

    def _wait_for_room(self) -> None:
        self._raise_failure()
        for appender in self._appenders:
            appender.room.acquire()
        self._raise_failure()
        if self._is_closed:
            raise UsageError(f"block {self.block} is closed: append before it is closed")

    def _encoding(self, names: Sequence[str], row: Row) -> list[Future[list[_NextChunk]]]:
        layers = range(len(self.spec.stored_layers))
        wanted = [(name, row[name][layer]) for name in names for layer in layers]
        # A task for each chunk, or one where they are small: it would cost as much as they do.
        tasks = [wanted] if len(names) > 1 else [[chunk] for chunk in wanted]
        return [self._encoders.submit(self._encode, chunks) for chunks in tasks]

    def _encode(self, chunks: Sequence[tuple[str, np.ndarray[Any, Any]]]) -> list[_NextChunk]:
        if self._is_closed or self._failure is not None:
            raise CancelledError
        return [(name, *_encoded(self._layouts[name], chunk)) for name, chunk in chunks]

    def _missing(self, names: Sequence[str]) -> list[_NextChunk]:
        return [(name, None, None) for name in names for _ in self.spec.stored_layers]

    def _submit(self, appender: _Appender, chunks: Iterable[_NextChunk]) -> None:
        task = appender.thread.submit(self._append, chunks)
        task.add_done_callback(lambda _: appender.room.release())  # also where it is cancelled

    def _append(self, chunks: Iterable[_NextChunk]) -> None:
        if self._failure is not None:
            return
        try:
            for name, stored, checksum in chunks:
                self._writers[name].append_encoded(stored, checksum)
        except BaseException as error:
            self._note(error)  # for the thread that owns the block

    def _note(self, error: BaseException) -> None:
        self._failure = self._failure or error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _results(parts: Sequence[Future[list[_NextChunk]]]) -> Iterable[_NextChunk]:
    for part in parts:
        yield from part.result()


def _chunk_nbytes(layout: ArrayLayout) -> int:
    return math.prod(layout.chunk_shape) * np.dtype(layout.dtype).itemsize


def _encoded(layout: ArrayLayout, chunk: np.ndarray[Any, Any]) -> EncodedChunk:
    if not layout.differenced:
        return layout.codec.encode_checked(chunk)
    differences = scratch(chunk.nbytes).view(chunk.dtype).reshape(chunk.shape)
    frame_difference(chunk, out=differences)
    return layout.codec.encode_checked(differences)
