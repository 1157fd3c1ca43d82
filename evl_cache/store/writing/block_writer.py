"""Writing one block: rows in, shards and the done mark out, whole or not at all. `publication` gives them their names."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import UsageError
from evl_cache.quantize import frame_difference
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.disk.publish import StagedFile
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import ArrayLayout, array_layouts
from evl_cache.store.format.marks import ClipRecord, Mark
from evl_cache.store.format.rows import Row
from evl_cache.store.format.size import sample_nbytes
from evl_cache.store.shards.codec import EncodedChunk, scratch
from evl_cache.store.shards.shard import ShardWriter
from evl_cache.store.writing.publication import BlockPublication
from evl_cache.store.writing.staged_block import stage_shard
from evl_cache.store.writing.stored_rows import StoredRow

# Rows being compressed or waiting for the disk, by their bytes before the codec: what bounds the memory of a block. One
# waits while one is written in any case; more than the most would make nothing faster.
_IN_FLIGHT_NBYTES = 512 << 20
_FEWEST_IN_FLIGHT, _MOST_IN_FLIGHT = 2, 16
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
    room: threading.BoundedSemaphore


def rows_in_flight(spec: CacheSpec) -> int:
    """Return how many rows of a block may be compressed or wait for the disk at a time."""
    row_nbytes, _ = sample_nbytes(spec)
    return min(max(_IN_FLIGHT_NBYTES // row_nbytes, _FEWEST_IN_FLIGHT), _MOST_IN_FLIGHT)


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
        self._publication = BlockPublication(cache_path, spec, block, lock=lock, runtime=runtime)
        large = [name for name, layout in self._layouts.items() if layout.chunk_nbytes >= _SMALL_NBYTES]
        small = [name for name in self._layouts if name not in large]
        self._appenders = [
            _Appender(names, runtime.executor("append"), threading.BoundedSemaphore(rows_in_flight(spec)))
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
        if row is None:
            self._hand_over(self._missing)
        else:
            self._hand_over(lambda names: _results(self._encoding(names, row)))

    def append_stored(self, row: StoredRow) -> None:
        """Hand over the next sample's row as it lies in a file of this block. Waits and raises as `append`."""
        self._hand_over(lambda names: [(name, chunk, None) for name in names for chunk in row[name]])

    def commit(self, clips: Sequence[ClipRecord], environment: Mapping[str, Any]) -> Mark:
        """Publish the block and its mark.

        Returns: the mark that stands: this one, or an equal block's that another job finished meanwhile.
        Raises: RowsAtStake where the block has features that would be lost; BlockLost where another job holds the
            block now; CacheError where the disk refuses; otherwise as `append`.
        """
        for appender in self._appenders:
            appender.thread.shutdown(wait=True)
        self._check_usable()
        records = {name: writer.close() for name, writer in self._writers.items()}
        mark = Mark(block=self.block, files=records, clips=tuple(clips), environment=environment)
        return self._publication.publish(mark, self._staged)

    def close(self) -> None:
        """Stop the threads and remove what was not published. Who waits in `append` gets an error."""
        self._is_closed = True
        for appender in self._appenders:
            appender.thread.shutdown(wait=True, cancel_futures=True)
        for staged in self._staged.values():
            staged.discard()

    def _open(self, name: str, layout: ArrayLayout) -> None:
        self._staged[name] = stage_shard(self.cache_path, layout, self.block, lock=self._lock)
        grid = (self.spec.block_samples, len(self.spec.stored_layers))
        self._writers[name] = ShardWriter(self._staged[name], grid=grid, codec=layout.codec)

    def _hand_over(self, chunks: Callable[[Sequence[str]], Iterable[_NextChunk]]) -> None:
        """Give every appender its arrays' chunks of the next row, once there is room."""
        self._check_usable()
        for appender in self._appenders:
            appender.room.acquire()
        self._check_usable()
        try:
            for appender in self._appenders:
                self._submit(appender, chunks(appender.names))
        except BaseException as error:  # the row may be in some arrays and not in others
            self._note(error)
            self._check_open()  # a thread that was stopped meanwhile takes nothing
            raise

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
        if not (self._is_closed and isinstance(error, CancelledError)):  # closing cancels: that is no failure
            self._failure = self._failure or error

    def _check_usable(self) -> None:
        self._check_open()
        if self._failure is not None:
            raise self._failure

    def _check_open(self) -> None:
        if self._is_closed:
            raise UsageError(f"block {self.block} is closed: append and commit before it is closed")


def _results(parts: Sequence[Future[list[_NextChunk]]]) -> Iterable[_NextChunk]:
    for part in parts:
        yield from part.result()


def _encoded(layout: ArrayLayout, chunk: np.ndarray[Any, Any]) -> EncodedChunk:
    if not layout.differenced:
        return layout.codec.encode_checked(chunk)
    differences = scratch(chunk.nbytes).view(chunk.dtype).reshape(chunk.shape)
    frame_difference(chunk, out=differences)
    return layout.codec.encode_checked(differences)
