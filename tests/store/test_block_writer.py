"""A block is written by many threads at once: the same bytes as one after another, errors told, nothing hangs."""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import zstd

from evl_cache.errors import CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockWriter,
    ClipRecord,
    LockWatcher,
    array_layouts,
    create_cache,
    valid_mark,
)
from evl_cache.store.disk import publish
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.disk.publish import StagedFile, is_staging_name
from evl_cache.store.format.layout import ArrayLayout
from evl_cache.store.format.size import sample_nbytes
from evl_cache.store.writing.block_writer import rows_in_flight
from tests.support.feature_caches import TOWER, VIEWS, clip_list

LIMIT_S = 60.0  # that no thread comes near
MOST = 16  # small rows in flight
LAYERS, FAILED = (2, 3, 4), (1, 6)
# Chunks of tokens are large, and their files longer than a huge page; the others are small.
LARGE = replace(TOWER, image_size=112, patch_size=8, width=192)
Rows = list[dict[str, np.ndarray[Any, Any]] | None]


def make_spec(clips: int, **changes: Any) -> CacheSpec:
    clip = clip_list([0] * clips, classes=1)
    fields = {
        "tower": LARGE,
        "views": VIEWS,
        "layers": LAYERS,
        "tokens": "int8",
        "maps": "uint8",
        "codec": "default",
        "block_clips": clips,
    }
    return CacheSpec(
        dataset="test", split="train", classes=clip.classes,
        compute_dtype="float32", num_clips=clips, content_id=clip.content_id, **{**fields, **changes},
    )  # fmt: skip


def make_rows(spec: CacheSpec, failed: Sequence[int] = ()) -> Rows:
    """Rows as a batch of the device gives them: layers are contiguous, a row's arrays as a whole are not."""
    rng, batches = np.random.default_rng(0), {}
    for name, layout in array_layouts(spec).items():
        shape = (len(LAYERS), spec.num_clips, *layout.chunk_shape)
        values = rng.normal(scale=9, size=shape) + (99 if layout.dtype == "uint8" else 0)
        batches[name] = values.astype(layout.dtype)
    return [
        None if row in failed else {name: batch[:, row] for name, batch in batches.items()}
        for row in range(spec.num_clips)
    ]


@contextmanager
def begun(cache: Path, spec: CacheSpec, *, threads: int = 3, block: int = 0) -> Iterator[BlockWriter]:
    """A writer of a cache's block, and threads that compress."""
    create_cache(cache, spec, clip_list([0] * spec.num_clips, classes=1).clips, origin={}, created_with={})
    lock = LockWatcher(cache / LOCKS_NAME).take(block)
    assert lock is not None
    with lock, ThreadPoolExecutor(threads) as encoders:
        writer = BlockWriter(cache, spec, block, lock=lock, encoders=encoders)
        try:
            yield writer
        finally:
            writer.close()


def records(spec: CacheSpec, failed: Sequence[int] = ()) -> list[ClipRecord]:
    return [
        ClipRecord(id=f"c{row}", error="broken" if row in failed else None) for row in range(spec.num_clips)
    ]


def stored_chunk(layout: ArrayLayout, values: np.ndarray[Any, Any]) -> bytes:
    """A chunk as docs/cache-format.md has it."""
    if layout.differenced:
        values = np.concatenate([values[:1], values[1:] - values[:-1]])
    if layout.codec.name == "raw":
        return values.tobytes() + crc32c(values.tobytes()).to_bytes(4, "little")
    return bytes(zstd.compress(values.tobytes(), layout.codec.zstd_level, True))


def shard_in_one_thread(
    layout: ArrayLayout, rows: Rows, num_chunks: int
) -> tuple[bytes, list[int], list[int]]:
    """A shard's bytes, and the sizes and checksums of its chunks, made the obvious way."""
    data, entries, sizes, checksums = bytearray(), [], [], []
    for row in rows:
        for layer in range(len(LAYERS)):
            if row is None:
                entries.append((2**64 - 1, 2**64 - 1))
                sizes.append(0)
                checksums.append(0)
                continue
            stored = stored_chunk(layout, row[layout.name][layer])
            is_raw = layout.codec.name == "raw"
            if is_raw and len(stored) >= 65536:
                data += bytes(-len(data) % 64)
            entries.append((len(data), len(stored)))
            sizes.append(len(stored))
            checksums.append(crc32c(stored[:-4] if is_raw else stored))
            data += stored
    assert len(entries) == num_chunks
    index = np.array(entries, "<u8").tobytes()
    return bytes(data) + index + crc32c(index).to_bytes(4, "little"), sizes, checksums


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    ("codec", "tokens", "maps"),
    [
        ("default", "int8", "uint8"),
        ("raw", "int8", "uint8"),
        ("archive", "int8", "none"),
        ("default", "fp16", "fp16"),
    ],
)
def test_bytes_are_those_of_one_thread_that_writes_chunk_after_chunk(
    tmp_path: Path, codec: str, tokens: str, maps: str, threads: int
) -> None:
    spec = make_spec(9, codec=codec, tokens=tokens, maps=maps)
    rows = make_rows(spec, FAILED)
    with begun(tmp_path / "cache", spec, threads=threads) as writer:
        for row in rows:
            writer.append(row)
        writer.commit(records(spec, FAILED), {})
    mark = valid_mark(tmp_path / "cache", spec, 0)
    assert mark is not None
    for name, layout in array_layouts(spec).items():
        data, sizes, checksums = shard_in_one_thread(layout, rows, spec.block_samples * len(LAYERS))
        found, record = layout.shard(tmp_path / "cache", 0).read_bytes(), mark.files[name]
        assert found == data, name
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert record.chunk_nbytes.tolist() == sizes
        assert record.chunk_checksums.tolist() == checksums


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if is_staging_name(path.name)]


@pytest.mark.parametrize("name", ["tokens", "map_scale"])
def test_an_error_in_one_appender_reaches_the_owner_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = make_spec(3 * MOST, tower=TOWER if name == "map_scale" else LARGE)
    (row, *_) = make_rows(replace(spec, num_clips=1))
    write, count = StagedFile.write, iter(range(10**6))

    def full(self: StagedFile, data: bytes, **known: Any) -> None:
        if name in self.path.parts and next(count) == 7:
            raise CacheError("cannot write: No space left on device")
        write(self, data, **known)

    monkeypatch.setattr(StagedFile, "write", full)
    with begun(tmp_path / "cache", spec) as writer:
        with pytest.raises(CacheError, match="No space left"):
            for _ in range(spec.num_clips):  # more than may wait: it neither hangs nor goes on
                writer.append(row)
            writer.commit(records(spec), {})
        with pytest.raises(CacheError, match="No space left"):
            writer.append(row)
        with pytest.raises(CacheError, match="No space left"):
            writer.commit(records(spec), {})
    assert left_behind(tmp_path / "cache") == []
    assert valid_mark(tmp_path / "cache", spec, 0) is None


def test_a_row_that_cannot_be_compressed_is_the_owners_error(tmp_path: Path) -> None:
    spec = make_spec(4)
    rows = make_rows(spec)
    assert rows[2] is not None
    del rows[2]["tokens"]
    with begun(tmp_path / "cache", spec) as writer:
        writer.append(rows[0])
        with pytest.raises(KeyError, match="tokens"):
            writer.append(rows[2])
        with pytest.raises(KeyError, match="tokens"):
            writer.commit(records(spec), {})
    assert left_behind(tmp_path / "cache") == []


def test_rows_in_flight_are_bounded_and_no_caller_waits_for_fewer(tmp_path: Path) -> None:
    spec = make_spec(MOST + 1, tower=TOWER)
    rows, appended = make_rows(spec), threading.Semaphore(0)
    may_encode = threading.Event()

    def append_all(writer: BlockWriter) -> None:
        for row in rows:
            writer.append(row)
            appended.release()

    with begun(tmp_path / "cache", spec, threads=1) as writer, ThreadPoolExecutor(1) as caller:
        busy = writer._encoders.submit(may_encode.wait, LIMIT_S)
        appending = caller.submit(append_all, writer)
        for _ in range(MOST):
            assert appended.acquire(timeout=LIMIT_S)
        assert not appended.acquire(timeout=0.1)
        may_encode.set()
        assert appended.acquire(timeout=LIMIT_S)
        appending.result(LIMIT_S)
        assert busy.result()
        writer.commit(records(spec), {})


def test_a_block_that_is_closed_under_load_stops_and_tells_who_appends(tmp_path: Path) -> None:
    spec = make_spec(2 * MOST + 1, tower=TOWER)
    rows, may_encode, is_full = make_rows(spec), threading.Event(), threading.Event()

    def append_all(writer: BlockWriter) -> None:
        for number, row in enumerate(rows):
            if number == MOST:
                is_full.set()
            writer.append(row)

    with begun(tmp_path / "cache", spec, threads=1) as writer, ThreadPoolExecutor(2) as others:
        busy = writer._encoders.submit(may_encode.wait, LIMIT_S)
        appending = others.submit(append_all, writer)
        assert is_full.wait(LIMIT_S)
        closing = others.submit(writer.close)
        with pytest.raises((UsageError, RuntimeError)):
            appending.result(LIMIT_S)
        may_encode.set()
        closing.result(LIMIT_S)
        assert busy.result()
    assert left_behind(tmp_path / "cache") == []


def test_who_appends_or_commits_after_a_close_under_load_hears_that_it_is_closed(tmp_path: Path) -> None:
    spec, may_encode = make_spec(4, tower=TOWER), threading.Event()
    rows = make_rows(spec)
    with begun(tmp_path / "cache", spec, threads=1) as writer, ThreadPoolExecutor(1) as other:
        writer._encoders.submit(may_encode.wait, LIMIT_S)
        writer.append(rows[0])
        closing = other.submit(writer.close)
        while not writer._is_closed:
            pass
        may_encode.set()
        closing.result(LIMIT_S)
        with pytest.raises(UsageError, match="is closed"):
            writer.append(rows[1])
        with pytest.raises(UsageError, match="is closed"):
            writer.append_stored({})
        with pytest.raises(UsageError, match="is closed"):
            writer.commit(records(spec), {})


def test_a_stored_row_that_lacks_an_array_keeps_its_block_from_being_committed(tmp_path: Path) -> None:
    """It may be in some arrays and not in others."""
    spec = make_spec(1)
    stored = {name: [b"chunk"] * len(LAYERS) for name in array_layouts(spec)}
    del stored["class_tokens"]
    with begun(tmp_path / "cache", spec) as writer:
        with pytest.raises(KeyError, match="class_tokens"):
            writer.append_stored(stored)
        with pytest.raises(KeyError, match="class_tokens"):
            writer.append_stored(stored)
        with pytest.raises(KeyError, match="class_tokens"):
            writer.commit(records(spec), {})
    assert valid_mark(tmp_path / "cache", spec, 0) is None


@pytest.mark.parametrize(
    ("image_size", "frames", "layers", "nbytes", "rows"),
    [(336, 32, 24, 952e6, 2), (224, 16, 24, 150e6, 3), (224, 16, 12, 75e6, 7), (224, 16, 4, 25e6, 16)],
)
def test_rows_in_flight_go_by_their_bytes(
    image_size: int, frames: int, layers: int, nbytes: float, rows: int
) -> None:
    """Rows of CLIP's L/14: half a gigabyte of them, two at least and sixteen at most."""
    tower = replace(TOWER, image_size=image_size, patch_size=14, width=1024, blocks=24)
    spec = make_spec(64, tower=tower, views=replace(VIEWS, frames=frames), layers=tuple(range(1, layers + 1)))
    assert sample_nbytes(spec)[0] == pytest.approx(nbytes, rel=0.01)
    assert rows_in_flight(spec) == rows


def test_opening_a_block_syncs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync would wait for what the block before has on its way to the disk."""
    spec = make_spec(4, tower=TOWER, block_clips=2)
    synced: list[int] = []
    with begun(tmp_path / "cache", spec) as first:
        lock = LockWatcher(tmp_path / "cache" / LOCKS_NAME).take(1)
        assert lock is not None
        with lock:
            monkeypatch.setattr(os, "fsync", synced.append)
            second = BlockWriter(tmp_path / "cache", spec, 1, lock=lock, encoders=first._encoders)
            monkeypatch.undo()
            second.close()
    assert synced == []


def test_every_file_is_safe_before_one_has_its_name_and_every_name_before_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, calls = make_spec(2, tower=TOWER), list[str]()
    name, sync = StagedFile._take_name, os.fsync

    def named(self: StagedFile, final: Path, **options: bool) -> None:
        name(self, final, **options)
        calls.append(f"name of {'a shard' if final.name.startswith('c.') else 'the mark'}")

    def synced(descriptor: int) -> None:
        sync(descriptor)
        calls.append("sync")

    monkeypatch.setattr(StagedFile, "_take_name", named)
    with begun(tmp_path / "cache", spec) as writer:
        for row in make_rows(spec):
            writer.append(row)
        monkeypatch.setattr(os, "fsync", synced)
        calls.clear()
        writer.commit(records(spec), {})
    arrays = array_layouts(spec).values()
    # The cache's directory and those on the way to the files, each once, and the mark's own bytes.
    ways = {parent for layout in arrays for parent in layout.shard(Path(), 0).parents}
    files, names = ["sync"] * len(arrays), ["name of a shard"] * len(arrays)
    assert calls == [*files, *names, *["sync"] * (len(ways) + 1), "name of the mark", "sync"]


def test_a_files_crc_is_the_same_whether_its_pieces_come_with_theirs_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [os.urandom(count) for count in (1, 70_000, 3 << 20, 0, 17)]
    whole = b"".join(parts)
    for combine in (publish.longer_crc32c, lambda previous, data, _: crc32c(data, previous)):
        monkeypatch.setattr(publish, "longer_crc32c", combine)
        with publish.stage_file(tmp_path) as staged:
            for part in parts:
                staged.write(part, checksum=crc32c(part))
            assert staged.crc32c == crc32c(whole)
