"""Every byte of blocks' shards, read and compared with what their marks promise."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import WholeFile, read_whole
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.objects.workers import Workers
from evl_cache.store.proving.promises import FileDigest, Promises, read_mark_whole
from evl_cache.store.shards.shard_index import check_end, index_nbytes

OnProgress = Callable[[str, int, int], None]
"""Called with what is counted (`marks` or `bytes`), how many are done, and how many there are; from one thread at a time."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A part of a cache's blocks.

    Attributes:
        percent: of the blocks that are done; one block at least.
        seed: draws the same blocks again; None for others each time.
    """

    percent: float
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise UsageError(f"a sample of {self.percent:g} %; expected more than 0 and at most 100")

    def draw(self, blocks: Sequence[int]) -> list[int]:
        """Return some of the blocks, in ascending order."""
        count = min(len(blocks), max(1, round(len(blocks) * self.percent / 100)))
        return sorted(random.Random(self.seed).sample(blocks, count))


class ReadsShards(Protocol):
    """Reads shards that lie elsewhere than under their paths."""

    def read(
        self, path: Path, promised: FileDigest, *, end_nbytes: int, on_part: Callable[[int], None]
    ) -> WholeFile:
        """Return what `read_whole` does. Raises: CacheDamaged; CacheError where it cannot be told what lies there."""


class ShardProof:
    """Reads shards and compares them with what marks promise.

    Args:
        promises: of the blocks; what the mark of a block that was done again meanwhile promises comes into it.
        remote: reads shards that lie on a server.
    """

    def __init__(
        self,
        cache_path: Path,
        spec: CacheSpec,
        promises: Promises,
        workers: Workers,
        remote: ReadsShards | None = None,
    ) -> None:
        self._cache_path, self._spec, self._remote = cache_path, spec, remote
        self._promises, self._workers = promises, workers
        self._layouts = list(array_layouts(spec).values())
        self._num_chunks = spec.block_samples * len(spec.stored_layers)
        self._lock, self._done = threading.Lock(), 0

    def read(self, blocks: Sequence[int], on_progress: OnProgress) -> Iterator[tuple[int, str]]:
        """Read all shards of blocks. Yield what is wrong with a block, in their order.

        Raises: CacheError where the disk refuses to tell of a mark, or a server fails.
        """
        total = sum(self._promises.nbytes(block) for block in blocks)

        def on_part(nbytes: int) -> None:
            self._workers.check()
            with self._lock:
                self._done += nbytes
                on_progress("bytes", self._done, total)

        def prove(some: tuple[int, Sequence[int]]) -> tuple[int, list[str]]:
            block, arrays = some
            found = (self._prove(block, array, on_part) for array in arrays)
            return block, [reason for reason in found if reason is not None]

        every = range(len(self._layouts))
        # Of few blocks each file is a thing of its own, so that no thread is without work.
        arrays = [every] if len(blocks) >= self._workers.in_hand else [range(i, i + 1) for i in every]
        shards = ((block, some) for block in blocks for some in arrays)
        for block, reasons in self._workers.each(prove, shards):
            for reason in reasons:
                yield block, reason

    def _prove(self, block: int, array: int, on_part: Callable[[int], None]) -> str | None:
        """Return what is wrong with a shard. It is read again where its block was done again during the look."""
        promised = self._promises.shard(block, array)
        reason = self._compare(block, array, promised, on_part)
        if reason is None:
            return None
        mark, promise, _ = read_mark_whole(self._cache_path, block, self._spec)
        if mark is None or (newer := mark.files[self._layouts[array].name].digest) == promised:
            return reason
        self._promises.admit(block, promise)
        return self._compare(block, array, newer, self._workers.check)

    def _compare(
        self, block: int, array: int, promised: FileDigest, on_part: Callable[[int], None]
    ) -> str | None:
        path = self._cache_path / self._layouts[array].shard_name(block)
        try:
            check_no_links(self._cache_path, path)
            found = self._read(path, promised, on_part)
            if (found.size, found.sha256) != promised:
                return f"{path}: its bytes are not those its mark promises; repair the cache"
            check_end(path, found.end, found.size, self._num_chunks)
        except CacheError as error:
            if self._remote is not None and not isinstance(error, CacheDamaged):
                raise  # the server fails, and what lies there is not known
            return str(error)
        return None

    def _read(self, path: Path, promised: FileDigest, on_part: Callable[[int], None]) -> WholeFile:
        end_nbytes = index_nbytes(self._num_chunks)
        if self._remote is not None:
            return self._remote.read(path, promised, end_nbytes=end_nbytes, on_part=on_part)
        return read_whole(path, end_nbytes=end_nbytes, on_part=on_part)
