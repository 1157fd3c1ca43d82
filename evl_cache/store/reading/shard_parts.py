"""A shard file received in parts of whole chunks, each of which its mark proves: what arrives damaged is asked for again."""

from collections.abc import Callable, Iterator

import numpy as np

from evl_cache.errors import CacheDamaged
from evl_cache.store.disk.publish import StagedFile
from evl_cache.store.objects.address import Data
from evl_cache.store.objects.objects import Objects
from evl_cache.store.reading.attempts import ATTEMPTS, attempts
from evl_cache.store.shards.codec import CRC_NBYTES, ChunkCodec
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.store.shards.shard_index import MISSING, index_content, index_nbytes

_PART_NBYTES = 16 << 20


class ShardParts:
    """The parts of a shard, as its mark describes it and our writers lay it out; (first byte, bytes) each.

    A shard that is laid out otherwise has parts, too, which nothing proves but the digest of the whole.

    Args:
        record: what the mark says of it.
        codec: how its chunks are stored.
    """

    def __init__(self, record: ShardRecord, codec: ChunkCodec) -> None:
        self._record, self._codec = record, codec
        self._nbytes = record.chunk_nbytes.astype(np.int64)
        self._starts = codec.starts(self._nbytes.tolist())
        self._end = int(self._starts[-1])
        self._is_known = self._end + index_nbytes(len(self._nbytes)) == record.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = 0
        while start < self._record.size:
            stop = self._stop(start)
            yield start, stop - start
            start = stop

    def wrong(self, start: int, nbytes: int, data: Data) -> str | None:
        """Return what is wrong with a part that arrived, or None."""
        view = memoryview(data).cast("B")
        if len(view) != nbytes:
            return f"{len(view)} of {nbytes} bytes from {start} on arrive"
        if not self._is_known:
            return None
        if start == self._end:
            return None if bytes(view) == self._index() else "its index arrives damaged"
        chunks = range(*map(int, np.searchsorted(self._starts[:-1], (start, start + nbytes))))
        at = start
        for chunk in chunks:
            first, count = int(self._starts[chunk]), int(self._nbytes[chunk])
            here = view[first - start : first - start + count]
            if any(view[at - start : first - start]) or not self._is_right(chunk, here):
                return f"chunk {chunk} arrives damaged"
            at = first + count
        return (
            f"what lies behind chunk {chunks.stop - 1} arrives damaged" if any(view[at - start :]) else None
        )

    def _stop(self, start: int) -> int:
        """Return where the part that begins at `start` ends."""
        if not self._is_known:
            return min(start + _PART_NBYTES, self._record.size)
        if start >= self._end:
            return self._record.size
        stop = int(np.searchsorted(self._starts, start + _PART_NBYTES, side="right")) - 1
        found = int(self._starts[stop])
        if found > start:
            return found
        return int(self._starts[np.searchsorted(self._starts, start, side="right")])  # one chunk is larger

    def _is_right(self, chunk: int, stored: memoryview) -> bool:
        if not len(stored):
            return True
        expected = int(self._record.chunk_checksums[chunk])
        # Of a raw chunk the checksum leaves out the last bytes, which are the same number.
        is_whole = self._codec.name != "raw" or stored[-CRC_NBYTES:] == expected.to_bytes(
            CRC_NBYTES, "little"
        )
        return is_whole and self._codec.checksum(stored) == expected

    def _index(self) -> bytes:
        index = np.full((len(self._nbytes), 2), MISSING, dtype="<u8")
        there = self._nbytes > 0
        index[there, 0], index[there, 1] = self._starts[:-1][there], self._nbytes[there]
        return index_content(index)


def receive_shard(
    objects: Objects,
    name: str,
    record: ShardRecord,
    codec: ChunkCodec,
    staged: StagedFile,
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Bring a shard into a staged file.

    Args:
        name: of the shard, relative to the cache.
        check: called before each request; what it raises ends the work.

    Raises: CacheDamaged where a part arrives damaged again and again, or the whole is not what its mark promises;
        FileNotFoundError; CacheError where server or disk refuse.
    """
    parts = ShardParts(record, codec)
    for start, nbytes in parts:
        staged.write(_intact_part(objects, name, parts, start, nbytes, check))
    if (staged.size, staged.sha256) != record.digest:
        raise CacheDamaged("what arrived is not what its mark promises")


def _intact_part(
    objects: Objects, name: str, parts: ShardParts, start: int, nbytes: int, check: Callable[[], None]
) -> bytes | bytearray | memoryview:
    wrong = None
    for _ in attempts():
        check()
        data = objects.get_range(name, start, nbytes)
        wrong = parts.wrong(start, nbytes, data)
        if wrong is None:
            return data
    raise CacheDamaged(f"{wrong}, {ATTEMPTS} times")
