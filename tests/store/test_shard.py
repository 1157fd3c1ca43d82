"""Shards are Zarr v3: other readers agree with ours, and no reader of ours passes damage on as features."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import threading
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numcodecs import zstd
from numpy.typing import NDArray

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.publish import stage_file, write_atomic
from evl_cache.store.reading.sparse_shard import SparseShard
from evl_cache.store.shards.codec import ChunkCodec
from evl_cache.store.shards.metadata import array_metadata, group_metadata, shard_name
from evl_cache.store.shards.shard import (
    ShardReader,
    ShardRecord,
    ShardWriter,
)
from evl_cache.store.shards.shard_file import LocalFile
from evl_cache.store.shards.shard_index import read_index
from tests.support.warm_python import warm_python

Array = NDArray[Any]
DTYPES = ("int8", "uint8", "float16", "float32")
CODECS = ("zstd", "raw")
LAYERS, CHUNK = 3, (4, 5)  # chunk without its two unit axes
BLOCK = 4


def random_chunks(samples: int, dtype: str, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).normal(scale=30, size=(samples, LAYERS, *CHUNK))
    return (values + (100 if dtype == "uint8" else 0)).astype(dtype)


def write_shard(path: Path, chunks: Sequence[Array | None], codec: ChunkCodec) -> ShardRecord:
    make_directories(path.parent)
    with stage_file(path.parent) as staged:
        writer = ShardWriter(staged, grid=(BLOCK, LAYERS), codec=codec)
        for chunk in chunks:
            writer.append(chunk)
        record = writer.close()
        staged.publish(path)
    return record


def write_array(root: Path, values: Array, missing: set[tuple[int, int]], codec: ChunkCodec) -> None:
    make_directories(root / "a")
    write_atomic(
        root / "zarr.json", canonical_json(group_metadata({"evl_cache": {"version": 1}})), replace=False
    )
    metadata = array_metadata(
        shape=values.shape,
        dtype=values.dtype,
        chunk_shape=(1, 1, *CHUNK),
        shard_shape=(BLOCK, LAYERS, *CHUNK),
        fill_value=float("nan") if values.dtype.kind == "f" else 0,
        codec=codec,
        attributes={"unit": "none"},
        dimension_names=("sample", "layer", "token", "channel"),
    )
    write_atomic(root / "a" / "zarr.json", canonical_json(metadata), replace=False)
    for block in range(-(-len(values) // BLOCK)):
        rows = range(block * BLOCK, min(len(values), (block + 1) * BLOCK))
        chunks = [None if (s, k) in missing else values[s, k] for s in rows for k in range(LAYERS)]
        write_shard(root / "a" / shard_name(block, values.ndim), chunks, codec)


def open_tensorstore(root: Path) -> Any:
    kvstore = {"driver": "file", "path": str(root / "a")}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()


def reader(path: Path, codec: ChunkCodec, dtype: str, checksums: Any = None) -> ShardReader:
    return ShardReader(
        path, grid=(BLOCK, LAYERS), chunk_shape=CHUNK, dtype=dtype, codec=codec, checksums=checksums
    )


def flip(path: Path, offset: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ bit]))


def forge(path: Path, encoded: Sequence[bytes], index: Array | None = None) -> None:
    """A shard whose index is intact whatever it says, written the obvious way."""
    offsets = np.cumsum([0, *map(len, encoded)])[:-1]
    entries = np.full((BLOCK * LAYERS, 2), 2**64 - 1, "<u8")
    entries[: len(encoded)] = np.stack([offsets, [len(chunk) for chunk in encoded]], 1)
    stored = (entries if index is None else index.astype("<u8")).tobytes()
    path.write_bytes(b"".join(encoded) + stored + crc32c(stored).to_bytes(4, "little"))


@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zarr_python_and_tensorstore_read_what_was_written(
    tmp_path: Path, dtype: str, codec_name: str
) -> None:
    values = random_chunks(BLOCK + 3, dtype)  # the last shard is short
    missing = {(1, 0), (2, 2), (BLOCK, 1)}
    write_array(tmp_path, values, missing, ChunkCodec(codec_name))
    expected = values.copy()
    for sample, layer in missing:
        expected[sample, layer] = np.nan if values.dtype.kind == "f" else 0

    group = zarr.open_group(tmp_path, mode="r")
    array = group["a"]
    assert isinstance(array, zarr.Array)
    assert group.attrs["evl_cache"] == {"version": 1}
    assert array.metadata.to_dict()["dimension_names"] == ("sample", "layer", "token", "channel")
    np.testing.assert_array_equal(array[...], expected)
    store = open_tensorstore(tmp_path)
    assert store.dtype.name == dtype
    np.testing.assert_array_equal(store.read().result(), expected)

    for block in range(2):
        shard = reader(tmp_path / "a" / shard_name(block, 4), ChunkCodec(codec_name), dtype)
        for chunk in np.flatnonzero(shard.present):
            sample, layer = divmod(int(chunk), LAYERS)
            np.testing.assert_array_equal(shard.read_chunk(int(chunk)), values[block * BLOCK + sample, layer])
    absent = {(s, k) for s in range(3, BLOCK) for k in range(LAYERS)} | {(0, 1)}
    assert {divmod(int(c), LAYERS) for c in np.flatnonzero(~shard.present)} == absent


@pytest.mark.parametrize("codec_name", CODECS)
def test_we_read_shards_of_zarr_python(tmp_path: Path, codec_name: str) -> None:
    values = random_chunks(BLOCK, "float16")
    metadata = array_metadata(
        shape=values.shape,
        dtype="float16",
        chunk_shape=(1, 1, *CHUNK),
        shard_shape=values.shape,
        fill_value=0.5,
        codec=ChunkCodec(codec_name),
        attributes={},
        dimension_names=list("slpc"),
    )
    write_atomic(tmp_path / "zarr.json", canonical_json(metadata), replace=False)
    array = zarr.open_array(tmp_path, mode="r+")
    array[...] = values
    shard = reader(tmp_path / shard_name(0, 4), ChunkCodec(codec_name), "float16")
    outs = np.empty((BLOCK * LAYERS, *CHUNK), np.float16)
    order = np.random.default_rng(1).permutation(BLOCK * LAYERS).tolist()
    shard.read_chunks(order, outs)
    np.testing.assert_array_equal(outs, values.reshape(-1, *CHUNK)[order])


def test_record_describes_the_file(tmp_path: Path) -> None:
    values = random_chunks(2, "int8").reshape(-1, *CHUNK)
    for name in CODECS:
        codec = ChunkCodec(name)
        chunks = [values[0], None, *values[2:]]
        record = write_shard(tmp_path / name, chunks, codec)
        data = (tmp_path / name).read_bytes()
        index = read_index(tmp_path / name, BLOCK * LAYERS)
        assert record.size == len(data)
        assert record.chunk_nbytes[1] == record.chunk_checksums[1] == record.chunk_nbytes[6] == 0
        for chunk in (0, 2, 3, 4, 5):
            offset, nbytes = index[chunk].tolist()
            stored = data[offset : offset + nbytes]
            assert nbytes == record.chunk_nbytes[chunk]
            assert record.chunk_checksums[chunk] == crc32c(stored[:-4] if name == "raw" else stored)


def test_appending_encoded_chunks_from_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    chunks = list(random_chunks(BLOCK, "float16").reshape(-1, *CHUNK))
    codec = ChunkCodec("zstd")
    expected = write_shard(tmp_path / "one", chunks, codec)
    with ThreadPoolExecutor(2) as pool, stage_file(tmp_path) as staged:
        writer = ShardWriter(staged, grid=(BLOCK, LAYERS), codec=codec)
        for position, encoded in enumerate(pool.map(codec.encode, chunks)):
            writer.append_encoded(encoded, position=position)
        assert writer.close() == expected


def test_order_of_append_is_enforced(tmp_path: Path) -> None:
    chunk = np.zeros(CHUNK, np.int8)
    with stage_file(tmp_path) as staged:
        writer = ShardWriter(staged, grid=(1, 2), codec=ChunkCodec("raw"))
        with pytest.raises(UsageError, match="chunk 1 appended where 0 is due"):
            writer.append(chunk, position=1)
        writer.append(chunk, position=0)
        with pytest.raises(UsageError, match="make them equal"):
            writer.append(chunk.astype(np.uint8))
        with pytest.raises(UsageError, match="None for a missing chunk"):
            writer.append_encoded(b"")
        writer.append(None, position=1)
        with pytest.raises(UsageError, match="full or closed"):
            writer.append(chunk)
        writer.close()
        with pytest.raises(UsageError, match="closed already"):
            writer.close()


@pytest.mark.parametrize("codec_name", CODECS)
def test_every_flipped_byte_is_noticed_by_our_reader(tmp_path: Path, codec_name: str) -> None:
    codec = ChunkCodec(codec_name)
    values = random_chunks(1, "int8").reshape(-1, *CHUNK)
    record = write_shard(tmp_path / "shard", list(values), codec)
    outs = np.empty((LAYERS, *CHUNK), np.int8)
    for offset in range(record.size):
        flip(tmp_path / "shard", offset, bit=1 << offset % 8)
        with pytest.raises(CacheDamaged, match=r"shard.*verify and repair"):
            reader(tmp_path / "shard", codec, "int8", record.chunk_checksums).read_chunks([0, 1, 2], outs)
        try:  # without the mark only bits of a frame header that mean nothing may pass
            reader(tmp_path / "shard", codec, "int8").read_chunks([0, 1, 2], outs)
        except CacheDamaged:
            pass
        else:
            assert codec_name == "zstd"
            np.testing.assert_array_equal(outs, values)
        flip(tmp_path / "shard", offset, bit=1 << offset % 8)


@pytest.mark.parametrize("codec_name", CODECS)
def test_a_flipped_bit_is_noticed_by_other_readers(tmp_path: Path, codec_name: str) -> None:
    values = random_chunks(BLOCK, "int8")
    write_array(tmp_path, values, set(), ChunkCodec(codec_name))
    path = tmp_path / "a" / shard_name(0, 4)
    offset, nbytes = read_index(path, BLOCK * LAYERS)[4].tolist()
    flip(path, offset + nbytes // 2)
    array = zarr.open_array(tmp_path / "a", mode="r")
    with pytest.raises((ValueError, RuntimeError)):
        array[1, 1]
    with pytest.raises(ValueError, match=r"DATA_LOSS|CRC-32C|[Cc]hecksum|zstd"):
        open_tensorstore(tmp_path)[1, 1].read().result()


@pytest.mark.parametrize("codec_name", CODECS)
def test_intact_chunks_and_shards_that_changed_places_are_noticed(tmp_path: Path, codec_name: str) -> None:
    codec = ChunkCodec(codec_name)
    values = random_chunks(BLOCK, "int8").reshape(-1, *CHUNK)
    record = write_shard(tmp_path / "shard", list(values), codec)
    other = write_shard(tmp_path / "other", list(values + 1), codec)
    assert len(set(record.chunk_checksums) | set(other.chunk_checksums)) == 2 * len(values)
    forge(tmp_path / "swapped", [codec.encode(values[chunk]) for chunk in (1, 0)])
    for path in (tmp_path / "other", tmp_path / "swapped"):
        reader(path, codec, "int8").read_chunk(0)  # intact by itself
        with pytest.raises(CacheDamaged, match=rf"{path.name}: chunk 0 of 12 .*its mark says"):
            reader(path, codec, "int8", record.chunk_checksums).read_chunk(0)


def test_missing_chunks_are_an_error_not_fill_values(tmp_path: Path) -> None:
    values = random_chunks(1, "float16").reshape(-1, *CHUNK)
    write_shard(tmp_path / "shard", [values[0], None], ChunkCodec("zstd"))
    shard = reader(tmp_path / "shard", ChunkCodec("zstd"), "float16")
    with pytest.raises(CacheDamaged, match="chunk 1 of 12 is missing"):
        shard.read_chunks([0, 1], np.empty((2, *CHUNK), np.float16))


@pytest.mark.parametrize("codec_name", CODECS)
def test_truncated_and_vanished_files_are_damage(tmp_path: Path, codec_name: str) -> None:
    codec = ChunkCodec(codec_name)
    path = tmp_path / "shard"
    record = write_shard(path, list(random_chunks(BLOCK, "int8").reshape(-1, *CHUNK)), codec)
    data = path.read_bytes()
    for size in [*range(0, 300, 7), record.size - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CacheDamaged, match=re.escape(str(path))):
            reader(path, codec, "int8").read_chunk(0)
    path.write_bytes(data)
    opened = reader(path, codec, "int8")
    opened.read_chunk(0)
    os.truncate(path, 10)  # under an open reader
    with pytest.raises(CacheDamaged, match="chunk 11 of 12 is cut off"):
        opened.read_chunk(11)
    path.unlink()
    with pytest.raises(CacheDamaged, match="No such file"):
        reader(path, codec, "int8").read_chunk(0)


def test_an_intact_index_that_lies_is_damage(tmp_path: Path) -> None:
    chunk = ChunkCodec("raw").encode(np.zeros(CHUNK, np.int8))
    missing = 2**64 - 1
    for offset, nbytes in [
        (0, len(chunk) + 1),  # reaches into the index
        (missing - 3, len(chunk)),  # overflows
        (missing, len(chunk)),  # half missing
        (0, missing),
        (1, len(chunk)),
        (0, 3),  # not the size of a chunk
    ]:
        index = np.full((BLOCK * LAYERS, 2), missing, np.uint64)
        index[7] = offset, nbytes
        forge(tmp_path / "shard", [chunk], index)
        with pytest.raises(CacheDamaged, match=r"chunk 7 "):
            reader(tmp_path / "shard", ChunkCodec("raw"), "int8").read_chunk(7)


def test_decompression_bombs_are_damage_and_allocate_nothing(tmp_path: Path) -> None:
    codec = ChunkCodec("zstd")
    size = np.zeros(CHUNK, np.int8).nbytes
    bomb = zstd.compress(bytes(1 << 28), 1, True)
    # The same frame, but its header claims the right size: FCS is 4 bytes at the 7th, after the window.
    single = bool(bomb[4] & 0x20)
    start = 5 if single else 6
    liar = bomb[:start] + size.to_bytes(4, "little") + bomb[start + 4 :]
    short = zstd.compress(bytes(size - 1), 1, True)
    unchecked = zstd.compress(bytes(size), 1, False)
    assert len(bomb) > 1000
    for name, frame in {"bomb": bomb, "liar": liar, "short": short, "unchecked": unchecked}.items():
        forge(tmp_path / name, [frame])
        out = np.full(CHUNK, 7, np.int8)
        tracemalloc.start()
        try:
            with pytest.raises(CacheDamaged, match="chunk 0 of 12"):
                reader(tmp_path / name, codec, "int8").read_chunk(0, out)
            with pytest.raises(CacheDamaged):
                codec.decode(frame, out)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20, name
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("codec_name", CODECS)
def test_neighbours_are_read_by_one_call(
    tmp_path: Path, codec_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_chunks(BLOCK, "int8").reshape(-1, *CHUNK)
    write_shard(tmp_path / "shard", list(values), ChunkCodec(codec_name))
    shard = reader(tmp_path / "shard", ChunkCodec(codec_name), "int8")
    outs = np.empty((3, *CHUNK), np.int8)
    shard.read_chunks([0, 1, 2], outs)
    calls = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    shard.read_chunks([6, 7, 8], outs)
    assert calls == 1
    np.testing.assert_array_equal(outs, values[6:9])
    shard.read_chunks([3, 4, 8], outs)
    assert calls == 3
    np.testing.assert_array_equal(outs, values[[3, 4, 8]])


@pytest.mark.parametrize("map_file", [False, True], ids=["read by calls", "mapped"])
def test_large_raw_chunks_lie_at_even_addresses_and_read_back(
    tmp_path: Path, map_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, codec = (1, 66_001), ChunkCodec("raw")
    values = np.random.default_rng(0).integers(-128, 128, (BLOCK * LAYERS, *shape)).astype(np.int8)
    missing = {3, 4, 5}  # a sample that failed
    record = write_shard(
        tmp_path / "shard", [None if k in missing else value for k, value in enumerate(values)], codec
    )
    index = read_index(tmp_path / "shard", BLOCK * LAYERS)
    there = [k for k in range(BLOCK * LAYERS) if k not in missing]
    assert not np.any(index[there, 0] % 64)
    # A copy that arrives in pieces puts them at the same places.
    copy = SparseShard(tmp_path / "copy", record, codec)
    assert copy.starts[:-1][there].tolist() == index[there, 0].tolist()

    shard = ShardReader(
        tmp_path / "shard",
        grid=(BLOCK, LAYERS),
        chunk_shape=shape,
        dtype="int8",
        codec=codec,
        checksums=record.chunk_checksums,
        open_file=partial(LocalFile, map_file=map_file),
    )
    calls: list[int] = []
    preadv = os.preadv
    shard.present  # noqa: B018 - opened now
    monkeypatch.setattr(os, "preadv", lambda *a: calls.append(1) or preadv(*a))
    for chunks in (range(6, 9), range(0, 3, 2), range(9, 10)):
        outs = np.zeros((len(chunks), 2, *shape), np.int8)[:, 1]
        shard.read_stacked(chunks, outs)
        np.testing.assert_array_equal(outs, values[list(chunks)])
    assert len(calls) == (0 if map_file else 4)  # neighbours by one call, whatever lies between them
    with pytest.raises(CacheDamaged, match="chunk 3 of 12 is missing"):
        shard.read_stacked(range(3, 6), np.empty((3, *shape), np.int8))
    flip(tmp_path / "shard", int(index[7, 0]) + 70)
    with pytest.raises(CacheDamaged, match="chunk 7 of 12 does not match its inner CRC-32C"):
        shard.read_stacked(range(6, 9), np.empty((3, *shape), np.int8))
    os.truncate(tmp_path / "shard", record.size - 5000)
    with pytest.raises(CacheDamaged, match="changed its size|is cut off" if map_file else "chunk"):
        shard.read_stacked(range(6, 9), np.empty((3, *shape), np.int8))


@pytest.mark.parametrize("codec_name", CODECS)
def test_short_reads_are_continued(tmp_path: Path, codec_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_chunks(BLOCK, "float32").reshape(-1, *CHUNK)
    write_shard(tmp_path / "shard", list(values), ChunkCodec(codec_name))

    def at_most_five(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        data = os.pread(descriptor, min(5, len(buffers[0])), offset)
        buffers[0][: len(data)] = data
        return len(data)

    monkeypatch.setattr(os, "preadv", at_most_five)
    outs = np.empty((12, *CHUNK), np.float32)
    reader(tmp_path / "shard", ChunkCodec(codec_name), "float32").read_chunks(range(12), outs)
    np.testing.assert_array_equal(outs, values)


@pytest.mark.parametrize("codec_name", CODECS)
def test_threads_share_a_reader_and_may_close_it(tmp_path: Path, codec_name: str) -> None:
    values = random_chunks(BLOCK, "float32").reshape(-1, *CHUNK)
    record = write_shard(tmp_path / "shard", list(values), ChunkCodec(codec_name))
    shard = reader(tmp_path / "shard", ChunkCodec(codec_name), "float32", record.chunk_checksums)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for k, chunk in enumerate(np.random.default_rng(seed).integers(0, 12, 200)):
                np.testing.assert_array_equal(shard.read_chunk(int(chunk)), values[chunk])
                if k % 20 == seed:
                    shard.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    shard.close()
    if os.path.isdir("/proc/self/fd"):  # where the garbage of other tests may be closed at any time
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        assert [
            link for link in links if os.path.realpath(link) == os.path.realpath(tmp_path / "shard")
        ] == []


def test_reader_opens_again_after_a_fork(tmp_path: Path) -> None:
    values = random_chunks(BLOCK, "int8").reshape(-1, *CHUNK)
    write_shard(tmp_path / "shard", list(values), ChunkCodec("zstd"))
    script = f"""
import os, sys
import numpy as np
from pathlib import Path
from evl_cache.store.shards.codec import ChunkCodec
from evl_cache.store.shards.shard import ShardReader
shard = ShardReader(Path({str(tmp_path / "shard")!r}), grid=(4, 3), chunk_shape=(4, 5), dtype="int8",
                    codec=ChunkCodec("zstd"))
first = shard.read_chunk(0)
opened = shard._open
pid = os.fork()
if pid == 0:
    same = np.array_equal(shard.read_chunk(0), first)
    os._exit(0 if same and shard._open is not opened and shard._open[0].pid == os.getpid() else 1)
assert os.waitpid(pid, 0)[1] == 0
assert np.array_equal(shard.read_chunk(0), first) and shard._open is opened
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [warm_python(), "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_reader_travels_to_other_processes_closed(tmp_path: Path) -> None:
    values = random_chunks(BLOCK, "int8").reshape(-1, *CHUNK)
    write_shard(tmp_path / "shard", list(values), ChunkCodec("raw"))
    shard = reader(tmp_path / "shard", ChunkCodec("raw"), "int8")
    shard.read_chunk(0)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(shard)).read_chunk(5), values[5])


def test_reading_is_lazy_and_wrong_use_is_refused(tmp_path: Path) -> None:
    shard = reader(tmp_path / "later", ChunkCodec("raw"), "float16")
    values = random_chunks(BLOCK, "float16").reshape(-1, *CHUNK)
    write_shard(tmp_path / "later", list(values), ChunkCodec("raw"))
    wide = np.empty((4, 10), np.float16)
    frozen = np.empty(CHUNK, np.float16)
    frozen.flags.writeable = False
    for out in (np.empty(CHUNK, np.float32), np.empty((5, 4), np.float16), wide[:, ::2], frozen):
        with pytest.raises(UsageError):
            shard.read_chunk(0, out)
    for chunk in (-1, 12):
        with pytest.raises(UsageError, match=f"chunk {chunk} asked for"):
            shard.read_chunk(chunk)
    with pytest.raises(UsageError, match="one output for each chunk"):
        shard.read_chunks([0, 1], [frozen])
    with pytest.raises(CacheDamaged, match="3 checksums for 12 chunks"):
        reader(tmp_path / "later", ChunkCodec("raw"), "float16", [1, 2, 3])


def test_stored_numbers_are_little_endian_whatever_the_array_says() -> None:
    values = np.arange(20, dtype=np.float32).reshape(CHUNK)
    for name in CODECS:
        codec = ChunkCodec(name)
        assert codec.encode(values.astype(">f4")) == codec.encode(values)
        assert codec.encode(np.asfortranarray(values)) == codec.encode(values)
        assert codec.encode(values.data) == codec.encode(values)


def test_crc32c_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


def test_contradicting_metadata_is_refused() -> None:
    good: dict[str, Any] = {
        "shape": (8, 3),
        "dtype": "float16",
        "chunk_shape": (1, 1),
        "shard_shape": (4, 3),
        "fill_value": float("nan"),
        "codec": ChunkCodec("zstd"),
        "attributes": {},
        "dimension_names": ("a", "b"),
    }
    assert array_metadata(**good)["fill_value"] == "NaN"
    canonical_json(array_metadata(**good))
    wrongs: list[dict[str, Any]] = [{"dtype": "int32"}, {"shape": (8,)}, {"chunk_shape": (3, 1)}]
    for wrong in wrongs:
        with pytest.raises(UsageError):
            array_metadata(**(good | wrong))
    with pytest.raises(UsageError, match="unknown chunk codec"):
        ChunkCodec("lz4")
    with pytest.raises(UsageError, match="zstd_level"):
        ChunkCodec("zstd", zstd_level=0)
