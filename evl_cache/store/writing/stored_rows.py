"""What is good of a block that is redone: its rows as they lie in its files, each chunk proved by the block's mark."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.format.layout import ArrayLayout, array_layouts
from evl_cache.store.format.marks import Mark
from evl_cache.store.shards.codec import CRC_NBYTES
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.store.shards.shard_file import LocalFile
from evl_cache.store.shards.shard_index import MISSING, OpenShard

StoredRow = Mapping[str, Sequence[bytes]]  # by array, a chunk a layer as the codec encoded it


class StoredRows:
    """Reads rows of one marked block without decoding them; threads may share it.

    A file whose index is damaged, or that lost its end, is read where our writers put its chunks.

    Args:
        mark: of the block; its checksums say which bytes are good.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec, mark: Mark) -> None:
        self._num_layers = len(spec.stored_layers)
        self._shards = {
            name: _StoredShard(cache_path, layout, mark.block, mark.files[name], spec)
            for name, layout in array_layouts(spec).items()
        }

    def read(self, row: int) -> StoredRow:
        """Return the row of a sample, counted in its block. Raises: CacheDamaged where a chunk is not what was written."""
        first = row * self._num_layers
        chunks = range(first, first + self._num_layers)
        return {name: [shard.read(chunk) for chunk in chunks] for name, shard in self._shards.items()}

    def is_intact(self, row: int) -> bool:
        """Whether the row of a sample, counted in its block, is what was written."""
        with contextlib.suppress(CacheError):
            self.read(row)
            return True
        return False


class _StoredShard:
    def __init__(
        self, cache_path: Path, layout: ArrayLayout, block: int, record: ShardRecord, spec: CacheSpec
    ) -> None:
        self._path, self._codec = layout.shard(cache_path, block), layout.codec
        self._nbytes, self._checksums = record.chunk_nbytes, record.chunk_checksums
        self._file: LocalFile | None = None
        places = [self._codec.starts(self._nbytes.tolist())[:-1]]
        with contextlib.suppress(CacheError, OSError):
            check_no_links(cache_path, self._path)
            self._file = LocalFile(self._path)
            index = OpenShard.open(self._path, spec.block_samples * len(spec.stored_layers)).index
            # First where the file says: a redo that was killed may have left the next attempt's.
            places.insert(0, np.where(index[:, 0] == MISSING, places[0], index[:, 0]).astype(np.int64))
        self._places = places

    def read(self, chunk: int) -> bytes:
        nbytes, expected = int(self._nbytes[chunk]), int(self._checksums[chunk])
        for place in self._places:
            if self._file is None or not nbytes:
                break
            stored = np.empty(nbytes, np.uint8)
            with contextlib.suppress(CacheDamaged):
                self._file.read([stored], int(place[chunk]))
                if self._is_good(stored, expected):
                    return stored.tobytes()
        raise CacheDamaged(f"{self._path}: chunk {chunk} is not what its mark promises; repair the cache")

    def _is_good(self, stored: np.ndarray, expected: int) -> bool:
        if self._codec.checksum(stored) != expected:
            return False
        if self._codec.name != "raw":
            return True
        # The mark's checksum leaves a raw chunk's own out, which is the same number.
        return int.from_bytes(stored[-CRC_NBYTES:].tobytes(), "little") == expected
