"""The chunks of samples, read from the shards of their blocks in the process that asks.

L layers. A `Stack` is an array's name, where its chunks go (L, slots, *chunk), and whether frames are differences.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import CacheDamaged
from evl_cache.quantize import frame_sum_
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links, is_local
from evl_cache.store.format.layout import ArrayLayout
from evl_cache.store.format.marks import ShardFiles
from evl_cache.store.reading.local_copy import LocalCopy
from evl_cache.store.reading.sparse_shard import SparseShard
from evl_cache.store.shards.read_ahead import ReadAhead
from evl_cache.store.shards.shard import ShardReader
from evl_cache.store.shards.shard_file import LocalFile, ShardFile
from evl_cache.store.shards.shard_pool import ShardKey, ShardPool

Stack = tuple[str, np.ndarray[Any, Any], bool]

_NFS_RETRIES = 2
_NFS_WAIT_S = 0.2
_READ_AHEAD = 8  # samples: without it a cold disk waits for each page fault
_READ_AHEAD_NBYTES = 1 << 16  # smaller chunks are not worth a system call


class SampleReader:
    """A reader of samples that are known to be in a cache. Threads may share it, not a slot.

    Attributes:
        maps_files: whether shards are mapped: they lie on a local disk.
        shards: those that are open, but for a remote cache's; readers of one process may share it.

    Args:
        files: records of the marked blocks' shards, as they come.
        copy: fetches what `cache_path` lacks, where it is a copy of a remote cache.
        trust: do not check chunks against their marks' checksums.
        shards: as the attribute; its own by default.
        first_block: number of its first block among those of all that share `shards`.
    """

    def __init__(
        self,
        cache_path: Path,
        spec: CacheSpec,
        *,
        layouts: Mapping[str, ArrayLayout],
        files: Mapping[int, ShardFiles],
        copy: LocalCopy | None,
        trust: bool,
        shards: ShardPool[ShardReader] | None = None,
        first_block: int = 0,
    ) -> None:
        self._cache_path, self._layouts, self._files, self._copy, self._trust = (
            cache_path,
            layouts,
            files,
            copy,
            trust,
        )
        self._num_layers, self._block_samples = len(spec.stored_layers), spec.block_samples
        self.maps_files = is_local(cache_path)
        self._open_file = partial(LocalFile, map_file=self.maps_files)
        self._read_ahead = ReadAhead(always=not self.maps_files)
        self.shards: ShardPool[ShardReader] = shards or ShardPool()
        self._first_block = first_block
        if copy is not None:
            copy.serve(files)

    def read(
        self, stacks: Sequence[Stack], wanted: Sequence[tuple[int, int]], positions: Sequence[int]
    ) -> None:
        """Read (slot, sample) pairs, at positions of the layer axis, and sum differences. Raises: CacheDamaged."""
        for start in range(0, len(wanted), _READ_AHEAD):
            group = wanted[start : start + _READ_AHEAD]
            if self._read_ahead.is_on():
                due = wanted[: 2 * _READ_AHEAD] if start == 0 else wanted[start + _READ_AHEAD :][:_READ_AHEAD]
                for _, later in due:
                    self._will_need(later, stacks, positions)
            with self._read_ahead.watching(len(group)):
                for slot, sample in group:
                    self.read_sample(stacks, slot, sample, positions)

    def read_sample(self, stacks: Iterable[Stack], slot: int, sample: int, positions: Sequence[int]) -> None:
        """Read one pair, as `read` does."""
        block, chunks = self.chunks(sample, positions)
        names = [name for name, _, _ in stacks]
        for name, stack, differenced in stacks:
            outs = stack[:, slot]  # (L,*chunk)
            try:
                self._read_chunks(name, block, chunks, outs, names)
            except CacheDamaged:
                self._read_again(name, block, chunks, outs)
            if differenced:
                for out in outs:  # in the processor's cache still
                    frame_sum_(out)

    def chunks(self, sample: int, positions: Sequence[int]) -> tuple[int, Sequence[int]]:
        """Return the block of a sample, and the sample's chunks in the block's shards."""
        block, row = divmod(sample, self._block_samples)
        first = row * self._num_layers
        if isinstance(positions, range):
            return block, range(first + positions.start, first + positions.stop, positions.step)
        return block, [first + position for position in positions]

    def prefetch(self, samples: Iterable[int], positions: Sequence[int], names: Iterable[str]) -> None:
        """Begin to fetch what `read` will read of the arrays named, where the cache lies behind a URL."""
        if self._copy is not None:
            self._copy.shards.prefetch((self.chunks(sample, positions) for sample in samples), names)

    def close(self) -> None:
        """Let go of every open file; the next read opens what it needs again."""
        self.shards.close()
        if self._copy is not None:
            self._copy.shards.let_go()

    def end_waits(self) -> None:
        """End what waits for a server now, in whatever thread: it raises WaitEnded."""
        if self._copy is not None:
            self._copy.end_waits()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._copy is not None:
            self._copy.serve(self._files)

    def _read_chunks(
        self, name: str, block: int, chunks: Sequence[int], outs: np.ndarray[Any, Any], names: Sequence[str]
    ) -> None:
        """Read chunks of an array; `names`: of the arrays that will be read of this sample."""
        if self._copy is None:
            self.shards.get((name, self._first_block + block), self._open_shard).read_stacked(chunks, outs)
            return
        held = self._copy.shards.hold(name, block, chunks, names)
        try:  # what is held is not removed to make room
            self._reader_of(held, name, block).read_stacked(chunks, outs)
        finally:
            held.release()

    def _will_need(self, sample: int, stacks: Iterable[Stack], positions: Sequence[int]) -> None:
        block, chunks = self.chunks(sample, positions)
        for name, _, _ in stacks:
            if self._layouts[name].chunk_nbytes < _READ_AHEAD_NBYTES:
                continue
            with contextlib.suppress(CacheDamaged):  # the read itself looks again, and tells
                if self._copy is None:
                    self.shards.get((name, self._first_block + block), self._open_shard).will_need(chunks)
                # To read holes would fill memory with small pages, which the data then have to go into.
                elif (held := self._copy.shards.find(name, block, chunks)) is not None:
                    try:
                        self._reader_of(held, name, block).will_need(chunks)
                    finally:
                        held.release()

    def _read_again(self, name: str, block: int, chunks: Sequence[int], outs: np.ndarray[Any, Any]) -> None:
        """Look again, in a newly opened file: on NFS a mark can be seen before its data."""
        for attempt in range(_NFS_RETRIES):
            if self._copy is not None:  # removed there to make room, or damaged on this disk
                self._copy.shards.refetch(name, block, chunks)
            self.shards.forget((name, self._first_block + block))
            try:
                self._read_chunks(name, block, chunks, outs, [name])
                return
            except CacheDamaged as error:
                if attempt + 1 == _NFS_RETRIES:
                    if self._copy is None:
                        raise
                    raise self._copy.damaged(error) from error
                time.sleep(_NFS_WAIT_S)

    def _open_shard(self, key: ShardKey) -> ShardReader:
        name, block = key[0], key[1] - self._first_block
        path = self._layouts[name].shard(self._cache_path, block)
        check_no_links(self._cache_path, path.parent)
        return self._reader(path, name, block, self._open_file)

    def _reader_of(self, held: SparseShard, name: str, block: int) -> ShardReader:
        reader = held.reader
        if reader is None:
            opener = held.file_opener(map_file=self.maps_files)
            reader = held.reader = self._reader(held.path, name, block, opener)
        return reader

    def _reader(
        self, path: Path, name: str, block: int, open_file: Callable[[Path], ShardFile]
    ) -> ShardReader:
        layout = self._layouts[name]
        return ShardReader(
            path,
            grid=(self._block_samples, self._num_layers),
            chunk_shape=layout.chunk_shape,
            dtype=layout.dtype,
            codec=layout.codec,
            checksums=self._files[block][name].chunk_checksums,
            trust=self._trust,
            open_file=open_file,
        )
