"""Writing one block: rows in, shards and the done mark out, whole or not at all. `publication` gives them their names."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.quantize import frame_difference
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.disk.publish import StagedFile, make_directories, stage_file
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import ArrayLayout, array_layouts
from evl_cache.store.format.marks import ClipRecord, Mark
from evl_cache.store.format.rows import Row
from evl_cache.store.shards.codec import scratch
from evl_cache.store.shards.shard import ShardWriter
from evl_cache.store.writing.finish import remove_leftovers
from evl_cache.store.writing.publication import BlockPublication
from evl_cache.store.writing.stored_rows import StoredRow

ROWS_IN_FLIGHT = 8  # rows being compressed or waiting for the disk: what bounds the memory of a block


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
        self._publication = BlockPublication(cache_path, spec, block, lock=lock)
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

    def append_stored(self, row: StoredRow) -> None:
        """Hand over the next sample's row as it lies in a file of this block. Waits and raises as `append`."""
        self._raise_failure()
        self._slots.acquire()
        self._appender.submit(self._append_encoded, row)

    def commit(self, clips: Sequence[ClipRecord], environment: Mapping[str, Any]) -> Mark:
        """Publish the block and its mark.

        Returns: the mark that stands: this one, or an equal block's that another job finished meanwhile.
        Raises: RowsAtStake where the block has features that would be lost; BlockLost where another job holds the
            block now; CacheError where the disk refuses.
        """
        self._appender.shutdown(wait=True)
        self._raise_failure()
        records = {name: writer.close() for name, writer in self._writers.items()}
        mark = Mark(block=self.block, files=records, clips=tuple(clips), environment=environment)
        return self._publication.publish(mark, self._staged)

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

    def _append_encoded(self, encoded: Mapping[str, Sequence[Future[bytes] | bytes]]) -> None:
        try:
            for name, writer in self._writers.items():
                for layer in range(len(self.spec.stored_layers)):
                    chunk = encoded[name][layer] if encoded else None
                    writer.append_encoded(chunk.result() if isinstance(chunk, Future) else chunk)
        except BaseException as error:  # kept for the thread that owns the block
            self._failure = self._failure or error
        finally:
            self._slots.release()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _encode(layout: ArrayLayout, chunk: np.ndarray[Any, Any]) -> bytes:
    if not layout.differenced:
        return layout.codec.encode(chunk)
    differences = scratch(chunk.nbytes).view(chunk.dtype).reshape(chunk.shape)
    frame_difference(chunk, out=differences)
    return layout.codec.encode(differences)
