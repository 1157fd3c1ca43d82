"""The device is kept fed, whatever feeds it: order, overlap, what is waited for, and memory that stays bounded."""

import queue
import threading
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from evl_cache.clips import Clip
from evl_cache.errors import CacheError
from evl_cache.extract.clips_ahead import MOST_WAITING_BYTES, ClipsAhead
from evl_cache.extract.device_pipeline import ClipRows, DevicePipeline
from evl_cache.extract.prepare import PreparedClip, prepare_clip
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.spec import ViewSpec
from evl_cache.store import ClipRecord, FeatureCache
from evl_cache.towers.backbone import Backbone
from evl_cache.video import ClipHeader, DecodeOptions
from evl_cache.video import pool as decode_pool
from evl_cache.video.pool import DecodePool
from tests.support.store_helpers import (
    extract_small,
    load_clips,
    make_clips,
    small_spec,
    small_tower,
    wait_until,
)


class Prepared:
    """Stands in for a decoder: notes what it is asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, rows: Sequence[int]) -> list[PreparedClip]:
        self.go_on.wait()
        self.rows += rows
        return [PreparedClip(record=ClipRecord(id=str(row)), samples=None) for row in rows]


def alone(rows: range) -> list[list[int]]:
    return [[row] for row in rows]


def ids(clips) -> list[int]:
    return [int(clip.record.id) for clip in clips]


def test_clips_are_decoded_ahead_across_blocks_and_each_once() -> None:
    prepare = Prepared()
    ahead = ClipsAhead(threads=1, waiting=3, clip_bytes=1)
    first, second = ahead.add(alone(range(4)), prepare), ahead.add(alone(range(4, 8)), prepare)
    wait_until(lambda: prepare.rows == [0, 1, 2, 3], what="the first block is decoded before anyone asks")
    assert ids(first) == [0, 1, 2, 3]
    wait_until(lambda: prepare.rows == list(range(8)), what="the second is decoded meanwhile")
    assert ids(second) == [4, 5, 6, 7]
    ahead.close(wait=True)
    assert prepare.rows == list(range(8))


def test_clips_that_are_asked_for_out_of_turn_are_begun_at_once() -> None:
    prepare = Prepared()
    ahead = ClipsAhead(threads=1, waiting=1, clip_bytes=1)
    first, second = ahead.add(alone(range(4)), prepare), ahead.add(alone(range(4, 6)), prepare)
    assert ids(second) == [4, 5] and ids(first) == [0, 1, 2, 3]
    ahead.close(wait=True)
    assert sorted(prepare.rows) == list(range(6))


def test_it_is_told_when_no_clip_is_left_to_be_begun() -> None:
    prepare, told = Prepared(), threading.Event()
    ahead = ClipsAhead(threads=1, waiting=1, clip_bytes=1, on_drained=told.set)
    clips = ahead.add(alone(range(3)), prepare)
    assert not ahead.is_drained and not told.is_set()
    next(clips)
    assert ahead.is_drained and told.is_set()
    ahead.close(wait=True)


@pytest.mark.parametrize(
    ("clip_bytes", "begun"), [(1, 2 + 6), (MOST_WAITING_BYTES // 2, 2 + 2), (1 << 40, 2 + 1)]
)
def test_no_more_clips_wait_than_memory_allows(clip_bytes: int, begun: int) -> None:
    prepare = Prepared()
    ahead = ClipsAhead(threads=2, waiting=6, clip_bytes=clip_bytes)
    clips = ahead.add(alone(range(100)), prepare)
    wait_until(lambda: len(prepare.rows) == begun, what="so many are begun")
    time.sleep(0.02)  # for more, if there were
    assert len(prepare.rows) == begun
    next(clips)
    wait_until(lambda: len(prepare.rows) == begun + 1, what="one more is begun for one that was taken")
    ahead.close(wait=True)


@pytest.mark.parametrize("beside", [False, True])
def test_rows_made_beside_the_next_batch_are_the_same_bytes(
    motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    clips = make_clips(tmp_path / "clips")
    plain = extract_small(clips, tmp_path / "plain")
    rows_are_made_beside(beside, monkeypatch)
    other = extract_small(clips, tmp_path / "other")
    assert other.cache_digest == plain.cache_digest and len(other.failures) == 1


def rows_are_made_beside(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    start = DevicePipeline._start

    def forced(self, staged):
        self.makes_rows_beside = beside
        if not beside and self._is_gpu:
            torch.cuda.synchronize()
        started = start(self, staged)
        if not beside and self._is_gpu:
            torch.cuda.synchronize()
        return started

    monkeypatch.setattr(DevicePipeline, "_start", forced)


@pytest.mark.gpu
def test_rows_made_on_a_stream_of_their_own_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = make_clips(tmp_path / "clips", count=16)
    beside = extract_small(clips, tmp_path / "beside", device="cuda")
    rows_are_made_beside(False, monkeypatch)
    plain = extract_small(clips, tmp_path / "plain", device="cuda")
    assert beside.cache_digest == plain.cache_digest


@pytest.mark.parametrize("slow", ["decoding", "transfer", "device", "writing"])
def test_the_bottleneck_is_what_takes_long(motions: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    clips = load_clips(motions)
    tower = small_tower(motions)
    spec = small_spec(clips, tower)
    waited = StageSeconds()

    def pause() -> None:
        """Longer than the other stages took: on a busy machine that may be long."""
        time.sleep(0.1 + 3 * sum(seconds for name, seconds in waited.seconds.items() if name != slow))

    def decoded():
        for number in range(6):
            if slow == "decoding":
                pause()
            samples = torch.zeros(1, 4, 3, 32, 32)
            yield ClipRows(PreparedClip(record=ClipRecord(id=str(number)), samples=samples), 1)

    def slowed(method):
        def call(self, *arguments):
            pause()
            return method(self, *arguments)

        return call

    def written(clip: ClipRows) -> None:
        if slow == "writing":
            pause()
        found.put(clip.record.id)

    if slow in ("transfer", "device"):
        name = {"transfer": "_transferred", "device": "_rows_of"}[slow]
        monkeypatch.setattr(DevicePipeline, name, slowed(getattr(DevicePipeline, name)))
    found: queue.SimpleQueue[str] = queue.SimpleQueue()
    pipeline = DevicePipeline(
        Backbone(tower.visual, spec.stored_layers), spec, device=torch.device("cpu"), batch=2, waited=waited
    )
    pipeline.add(decoded(), written)
    assert [found.get(timeout=60) for _ in range(6)] == list("012345")
    pipeline.close()
    assert waited.bottleneck == slow and pipeline.failure is None


def test_what_goes_wrong_in_a_thread_ends_the_pipeline_and_is_told(motions: Path) -> None:
    clips = load_clips(motions)
    tower = small_tower(motions)
    spec = small_spec(clips, tower)
    failed = threading.Event()

    def decoded():
        yield ClipRows(PreparedClip(record=ClipRecord(id="0"), samples=torch.zeros(1, 4, 3, 32, 32)), 1)
        raise CacheError("the disk is gone")

    pipeline = DevicePipeline(
        Backbone(tower.visual, spec.stored_layers),
        spec,
        device=torch.device("cpu"),
        batch=1,
        waited=StageSeconds(),
        on_failure=failed.set,
    )
    pipeline.add(decoded(), lambda clip: None)
    assert failed.wait(60) and str(pipeline.failure) == "the disk is gone"
    pipeline.close()


def test_large_pictures_take_no_more_memory_the_more_are_asked_for(
    motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen pictures of 6 MB; how many are held at a time does not depend on how many there are."""
    monkeypatch.setattr(decode_pool, "HELD_BYTES", 10 << 20)
    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 1080, 1920, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for number in range(16):
            picture = np.full((1080, 1920, 3), 15 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    clip = Clip(id="large", path=path.name, label=0, split="train")
    tower, views = small_tower(motions).spec, ViewSpec(frames=16, stride=1)
    with DecodePool(1) as pool:
        tracemalloc.start()
        found = prepare_clip(clip, tmp_path, tower=tower, views=views, decode=pool.frames)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.record.error is None and found.samples is not None
    brightness = found.samples[0].mean((1, 2, 3))
    assert torch.all(brightness[1:] > brightness[:-1])  # in their order
    one = 1080 * 1920 * 3
    assert peak < decode_pool.HELD_BYTES + 3 * one < 16 * one


def test_a_caller_that_stops_halfway_costs_a_process_and_no_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(decode_pool, "HELD_BYTES", 0)
    clips = make_clips(tmp_path, count=2)
    with DecodePool(1) as pool:
        for _ in range(3):
            events = pool.frames(tmp_path / clips.clips[0].path, lambda count: np.arange(count)[None])
            assert isinstance(next(events), ClipHeader)
            next(events)
            events.close()
        header, *frames = pool.frames(tmp_path / clips.clips[1].path, lambda count: np.arange(count)[None])
        assert header.num_frames_in_file == sum(map(len, frames)) == 8


def test_torchcodec_decodes_and_its_caches_are_others(motions: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchcodec", reason="the extra torchcodec is not installed", exc_type=ImportError)
    clips = make_clips(tmp_path / "clips", count=4)
    spec = small_spec(clips, small_tower(motions))
    plain = extract_small(clips, tmp_path / "plain", spec=spec)
    other_spec = small_spec(clips, small_tower(motions), pixels="torchcodec-cpu")
    options = DecodeOptions(decoder="torchcodec")
    other = extract_small(clips, tmp_path / "other", spec=other_spec, decoding=options)
    assert not other.failures and other.cache_digest != plain.cache_digest
    assert other_spec.feature_id != spec.feature_id and "pixels" not in spec.to_json()
    caches = [FeatureCache(tmp_path / name) for name in ("plain", "other")]
    assert caches[1].spec.pixels == "torchcodec-cpu"
    assert all(decoder.startswith("torchcodec") for decoder, _ in caches[1].provenance)
    one, two = (cache.read([0, 1, 2, 3])[0][-1] for cache in caches)
    assert (one - two).abs().mean() < 0.1 * one.abs().mean()
