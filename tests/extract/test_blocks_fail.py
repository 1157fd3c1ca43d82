"""Blocks begun ahead when something goes wrong: the first failure is told, what is done stays, locks are given back."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.block_taker import BlockTaker
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import _differences, repair
from evl_cache.spec import ViewSpec
from evl_cache.store import LOCKS_NAME, LockWatcher
from evl_cache.store.writing.block_writer import BlockWriter
from tests.support.blocks_ahead import Device, extract_in, overflown
from tests.support.store_helpers import (
    BROKEN,
    load_clips,
    make_clips,
    one_thread,
    small_spec,
    small_tower,
    wait_until,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def failed_before_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline has failed before the second block's lock is had, as on a slow disk."""
    extractors: list[BlockExtractor] = []
    set_up, take = BlockExtractor._set_up, LockWatcher.take

    def noted(self, batch, **given):
        set_up(self, batch, **given)
        extractors.append(self)

    waited: list[int] = []

    def slow_take(self, block):
        if block == 1 and not waited:
            waited.append(block)
            deadline = time.monotonic() + 30
            while not extractors[-1]._pipeline._places._is_closed and time.monotonic() < deadline:
                time.sleep(0.01)
        return take(self, block)

    monkeypatch.setattr(BlockExtractor, "_set_up", noted)
    monkeypatch.setattr(LockWatcher, "take", slow_take)


def test_the_first_failure_is_told_where_a_block_is_begun_after_it(
    motions: Path, tmp_path: Path, device: Device, failed_before_second: None
) -> None:
    def fails(frames: torch.Tensor) -> None:
        raise ZeroDivisionError("the first failure")

    device.before = fails
    try:
        with pytest.raises(ZeroDivisionError):
            extract_in(3, load_clips(motions), tmp_path / "cache")
    finally:
        staged = [path.name for path in (tmp_path / "cache").rglob(".tmp-*")]
    assert staged == []


def test_out_of_memory_halves_the_batch_where_a_block_is_begun_after_it(
    motions: Path, tmp_path: Path, device: Device, failed_before_second: None
) -> None:
    def fails(frames: torch.Tensor) -> None:
        if len(frames) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    device.before = fails
    clips = load_clips(motions)
    result, _, _ = extract_in(3, clips, tmp_path / "cache")
    assert result.clips_done_here == len(clips.clips)


def test_views_of_one_clip_that_overflow_fail_that_clip_alone(
    motions: Path, tmp_path: Path, device: Device
) -> None:
    clips = load_clips(motions)
    views = ViewSpec(frames=4, stride=2, temporal_views=3)
    spec = small_spec(clips, small_tower(motions), compute_dtype="float16", views=views)
    device.after = lambda features: overflown(features, slice(None)) if len(device.batches) == 2 else features
    result, _, _ = extract_in(3, clips, tmp_path / "cache", spec=spec)
    assert [clip for clip, _ in result.failures] == [clips.clips[1].id, BROKEN]


def test_a_clip_that_overflows_again_stays_failed(motions: Path, tmp_path: Path, device: Device) -> None:
    clips = load_clips(motions)
    spec = small_spec(clips, small_tower(motions), compute_dtype="float16")
    device.after = lambda features: overflown(features, slice(0, 1)) if len(device.batches) == 1 else features
    extract_in(3, clips, tmp_path / "cache", spec=spec)
    device.batches.clear()
    result, _, _ = extract_in(3, clips, tmp_path / "cache", spec=spec, retry_failed=True)
    assert [clip for clip, _ in result.failures] == [clips.clips[0].id, BROKEN]


def test_a_block_that_is_being_committed_is_committed_though_the_next_one_fails(
    motions: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, encode, committing = BlockTaker._commit, BlockWriter._encode, threading.Event()

    def noted(taker, block, extracted, lock):
        committing.set()
        return commit(taker, block, extracted, lock)

    def slow(self, chunks):
        if self.block == 0:
            time.sleep(0.3)
        return encode(self, chunks)

    def fails(frames: torch.Tensor) -> None:
        if device.batches:
            assert committing.wait(30)
            raise ZeroDivisionError

    monkeypatch.setattr(BlockTaker, "_commit", noted)
    monkeypatch.setattr(BlockWriter, "_encode", slow)
    device.before = fails
    with pytest.raises(ZeroDivisionError):
        extract_in(3, load_clips(motions), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache/done").glob("0*.json")] == ["000000.json"]


def test_locks_are_released_though_closing_is_interrupted(
    motions: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, closed = BlockExtractor.close, []

    def interrupted(self) -> None:
        closed.append(self)
        if len(closed) == 1:
            raise KeyboardInterrupt
        close(self)

    def fails(frames: torch.Tensor) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(BlockExtractor, "close", interrupted)
    device.before = fails
    with pytest.raises(KeyboardInterrupt):
        extract_in(3, load_clips(motions), tmp_path / "cache")
    assert list((tmp_path / "cache" / LOCKS_NAME).glob("0*.lock")) == []


def test_a_block_that_is_ready_is_committed_before_many_others_are_tried_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = make_clips(tmp_path / "clips", 12, broken=False)
    good = {place: (tmp_path / "clips" / f"{place:02d}.mp4").read_bytes() for place in (0, 3, 6, 9)}
    for place, content in good.items():
        (tmp_path / "clips" / f"{place:02d}.mp4").write_bytes(content[:200])
    extract_in(3, clips, tmp_path / "cache")
    (tmp_path / "clips" / "00.mp4").write_bytes(good[0])
    told: list[str] = []
    begin, end = BlockExtractor.begin, BlockExtractor.end

    def begun(self, block, lock, redo=None):
        if block:
            wait_until(lambda: not self._begun or self._begun[0].is_ready, what="the first is ready")
        told.append(f"begin {block}")
        return begin(self, block, lock, redo)

    def ended(self, begun):
        told.append(f"end {begun.block}")
        return end(self, begun)

    monkeypatch.setattr(BlockExtractor, "begin", begun)
    monkeypatch.setattr(BlockExtractor, "end", ended)
    extract_in(3, clips, tmp_path / "cache", retry_failed=True)
    assert told.index("end 0") < told.index("begin 2"), told


def test_repair_tells_the_batch_that_it_ran_with(motions: Path, tmp_path: Path, device: Device) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    extract_in(3, clips, cache)
    shard = next(
        path for path in sorted((cache / "tokens").rglob("*")) if path.is_file() and path.stat().st_size
    )
    shard.write_bytes(b"\0" * shard.stat().st_size)

    def fails(frames: torch.Tensor) -> None:
        if len(frames) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    device.before = fails
    with one_thread():
        result = repair(
            cache, tower=lambda description: small_tower(motions), root=motions, options=ExtractOptions()
        )
    assert result.environment_differs == ("batch: 2, not 3",)


def test_memory_that_runs_out_while_clips_are_prepared_halves_no_batch(
    motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self, rows):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(BlockExtractor, "_prepare", no_memory)
    halved = []
    monkeypatch.setattr(BlockExtractor, "_halve_batch", lambda self, failure: halved.append(failure))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        extract_in(2, load_clips(motions), tmp_path / "cache")
    assert halved == []


def test_repair_compares_what_both_marks_tell(motions: Path, tmp_path: Path) -> None:
    """A mark of another version tells less, or more."""
    clips, cache = load_clips(motions), tmp_path / "cache"
    extract_in(3, clips, cache)
    mark = cache / "done" / "000000.json"
    told = json.loads(mark.read_text())["environment"]
    assert _differences({**told, "pixels_by": "cpu AVX2"}, {**told, "threads_then": 8}) == ()
    assert _differences({**told, "batch": 2}, told) == ("batch: 2, not 3",)
