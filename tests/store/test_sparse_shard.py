"""A shard that arrives in pieces, in any order, from several threads and processes: its bytes are the source's."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from evl_cache.store.disk.publish import stage_file
from evl_cache.store.reading.copy_root import CopyRoot
from evl_cache.store.reading.sparse_shard import SparseShard
from evl_cache.store.shards.codec import ChunkCodec
from evl_cache.store.shards.shard import ShardRecord, ShardWriter

CHUNKS, CHUNK_NBYTES, PIECE = 18, 1_100_000, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ShardRecord]:
    """A shard of 20 MB, and its record."""
    path = tmp_path_factory.mktemp("source") / "shard"
    values = np.random.default_rng(0).integers(0, 256, (CHUNKS, CHUNK_NBYTES), np.uint8)
    record = write_shard(path, list(values))
    return path.read_bytes(), record


def write_shard(path: Path, values: list[np.ndarray]) -> ShardRecord:
    with stage_file(path.parent) as staged:
        writer = ShardWriter(staged, grid=(len(values), 1), codec=ChunkCodec("raw"))
        for value in values:
            writer.append(value)
        record = writer.close()
        staged.publish(path)
    return record


def put(shard: SparseShard, content: bytes, first: int, stop: int) -> int:
    """Write a piece as who fetches does, alone; return the bytes that it took on the disk."""
    with CopyRoot(shard.path.parent, limit_nbytes=1 << 30).room(0):
        return shard.write(first, stop, content[int(shard.starts[first]) : int(shard.starts[stop])])


def has(shard: SparseShard, chunks: Sequence[int]) -> bool:
    if not shard.hold():
        return False
    try:
        return shard.has(chunks)
    finally:
        shard.release()


@pytest.mark.parametrize("seed", range(3))
def test_pieces_that_meet_within_a_page_do_not_overwrite_each_other(
    source: tuple[bytes, ShardRecord], tmp_path: Path, seed: int
) -> None:
    content, record = source
    # Each opens the file for itself, as another process would.
    shards = [SparseShard(tmp_path / "copy", record, ChunkCodec("raw")) for _ in range(3)]
    pieces = [(first, min(first + PIECE, CHUNKS)) for first in range(0, CHUNKS, PIECE)] * 3
    random.Random(seed).shuffle(pieces)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: put(shards[n % 3], content, *pieces[n]), range(len(pieces))))
    data = int(shards[0].starts[-1])
    assert (tmp_path / "copy").read_bytes()[:data] == content[:data]
    assert all(has(shard, range(CHUNKS)) for shard in shards)


def test_pages_are_written_whole_and_only_what_came_is_said_to_be_here(
    source: tuple[bytes, ShardRecord], tmp_path: Path
) -> None:
    content, record = source
    shard = SparseShard(tmp_path / "copy", record, ChunkCodec("raw"))
    put(shard, content, 5, 10)
    start, stop = int(shard.starts[5]), int(shard.starts[10])
    page = 2 << 20
    written = (tmp_path / "copy").read_bytes()
    assert written[start:stop] == content[start:stop]
    assert not any(written[:start]) and not any(written[stop : int(shard.starts[-1])])
    descriptor = os.open(tmp_path / "copy", os.O_RDONLY)
    try:
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == start // page * page
        assert os.lseek(descriptor, start, os.SEEK_HOLE) == -(-stop // page) * page
    finally:
        os.close(descriptor)
    assert has(shard, range(5, 10)) and has(shard, [5, 7]) and not has(shard, range(4, 6))


def test_a_small_piece_takes_no_more_room_than_itself(
    source: tuple[bytes, ShardRecord], tmp_path: Path
) -> None:
    content, record = source
    shard = SparseShard(tmp_path / "copy", record, ChunkCodec("raw"))
    put(shard, content, 0, 1)
    assert put(shard, content, 7, 8) < CHUNK_NBYTES + 3 * 4096


def test_what_is_dropped_is_not_known_any_more(source: tuple[bytes, ShardRecord], tmp_path: Path) -> None:
    content, record = source
    shard = SparseShard(tmp_path / "copy", record, ChunkCodec("raw"))
    put(shard, content, 0, 3)
    assert has(shard, range(3))
    damaged = int(shard.starts[1]) + 9
    with (tmp_path / "copy").open("r+b", buffering=0) as file:
        file.seek(damaged)
        file.write(bytes([content[damaged] ^ 1]))
    assert shard.hold()
    shard.drop_damaged(range(3))
    shard.release()
    assert not has(shard, range(3)) and has(shard, [0]) and has(shard, [0, 2])
