"""Blocks are begun before the one before is ready: nothing waits at a border, and bytes follow from the block alone."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evl_cache.errors import UsageError
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.block_taker import BlockTaker
from evl_cache.extract.device_pipeline import DevicePipeline
from evl_cache.extract.stage_seconds import StageSeconds
from evl_cache.spec import ViewSpec
from evl_cache.store import LOCKS_NAME, LockWatcher, create_cache
from evl_cache.towers import Backbone
from tests.support.blocks_ahead import Device, extract_in, overflown
from tests.support.store_helpers import (
    BLOCK_CLIPS,
    BROKEN,
    differences,
    load_clips,
    make_clips,
    small_job,
    small_spec,
    small_tower,
    tree,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def environments(cache: Path) -> list[dict]:
    return [json.loads(path.read_text())["environment"] for path in sorted((cache / "done").glob("0*.json"))]


def test_a_batch_above_the_block_is_a_block(motions: Path, tmp_path: Path, device: Device) -> None:
    clips = load_clips(motions)
    extract_in(BLOCK_CLIPS, clips, tmp_path / "block")
    assert set(device.batches) == {BLOCK_CLIPS}
    ran = len(device.batches)
    extract_in(1000, clips, tmp_path / "above")
    assert device.batches[ran:] == device.batches[:ran]
    assert differences(tree(tmp_path / "above"), tree(tmp_path / "block")) == []
    assert {environment["batch"] for environment in environments(tmp_path / "above")} == {BLOCK_CLIPS}


def test_out_of_memory_halves_the_batch_once_said_and_goes_on(tmp_path: Path, device: Device) -> None:
    clips = make_clips(tmp_path / "clips")
    extract_in(1, clips, tmp_path / "small")
    device.batches.clear()

    def too_many(frames: torch.Tensor) -> None:
        if (
            len(frames) > 1 and len(device.batches) >= 1
        ):  # the first batch of two has room, so a block is half done
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB of which "
                "1.00 GiB is free."
            )

    device.before = too_many
    result, told, outages = extract_in(2, clips, tmp_path / "cache")
    assert differences(tree(tmp_path / "cache"), tree(tmp_path / "small")) == []
    assert len(outages) == 1
    assert outages[0] == (
        "out of memory on the GPU (2.00 GiB asked for, 1.00 GiB free) for batches of 2 samples; going on with batches "
        "of 1, as --batch 1 would"
    )
    assert len(told) == len(clips.clips) == result.clips_done_here and sum(told) == 1
    assert {environment["batch"] for environment in environments(tmp_path / "cache")} == {1}


def test_out_of_memory_for_a_single_sample_is_an_error(motions: Path, tmp_path: Path, device: Device) -> None:
    def never(frames: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    device.before = never
    with pytest.raises(torch.OutOfMemoryError):
        extract_in(2, load_clips(motions), tmp_path / "cache")
    assert list((tmp_path / "cache" / "locks").glob("0*.lock")) == []


def float16_spec(clips, folder: Path):
    return small_spec(clips, small_tower(folder), compute_dtype="float16")


def test_a_tower_that_overflows_on_every_clip_stops_the_run_after_its_first_batch(
    motions: Path, tmp_path: Path, device: Device
) -> None:
    clips = load_clips(motions)
    device.after = lambda features: overflown(features, slice(None))
    with pytest.raises(UsageError, match="--compute-dtype bfloat16"):
        extract_in(2, clips, tmp_path / "cache", spec=float16_spec(clips, motions))
    assert environments(tmp_path / "cache") == [] and len(device.batches) <= 3


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_tower_whose_features_are_never_storable_stops_the_run_and_blames_no_clip(
    motions: Path, tmp_path: Path, device: Device, compute_dtype: str
) -> None:
    few = load_clips(motions)
    clips = replace(few, clips=(*few.clips, *(replace(clip, id=f"again-{clip.id}") for clip in few.clips)))
    device.after = lambda features: overflown(features, slice(None))
    spec = small_spec(clips, small_tower(motions), compute_dtype=compute_dtype)
    with pytest.raises(UsageError, match="none of the first 8 clips can be stored") as raised:
        extract_in(2, clips, tmp_path / "cache", spec=spec)
    assert len(device.batches) <= 6
    assert "float32" not in str(raised.value) and "weights" in str(raised.value)


def test_a_clip_that_overflows_alone_fails_alone(motions: Path, tmp_path: Path, device: Device) -> None:
    clips = load_clips(motions)
    device.after = lambda features: overflown(features, slice(0, 1)) if len(device.batches) == 1 else features
    result, _, _ = extract_in(2, clips, tmp_path / "cache", spec=float16_spec(clips, motions))
    assert [clip for clip, _ in result.failures] == [clips.clips[0].id, BROKEN]
    assert "--compute-dtype bfloat16" in result.failures[0][1]


@pytest.mark.parametrize("compute_dtype", ["float32", "float16"])
def test_the_first_clip_fails_alone_whatever_its_views(
    motions: Path, tmp_path: Path, device: Device, compute_dtype: str
) -> None:
    clips = load_clips(motions)
    views = ViewSpec(frames=4, stride=2, temporal_views=4, spatial_views=3)
    spec = small_spec(clips, small_tower(motions), compute_dtype=compute_dtype, views=views)
    device.after = lambda features: (
        overflown(features, slice(None)) if len(device.batches) <= views.per_clip // 4 else features
    )
    result, _, _ = extract_in(4, clips, tmp_path / "cache", spec=spec)
    assert [clip for clip, _ in result.failures] == [clips.clips[0].id, BROKEN]


def test_the_device_goes_on_while_a_block_is_committed(
    motions: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = load_clips(motions)
    commit, came_on = BlockTaker._commit, threading.Event()
    before_third = 3  # batches of the first two blocks: two, and one beside a batch of the broken clip alone

    def slow_commit(taker, block, extracted, lock):
        assert came_on.wait(60)
        return commit(taker, block, extracted, lock)

    def noted(frames: torch.Tensor) -> None:
        if len(device.batches) == before_third:
            came_on.set()

    device.before = noted
    monkeypatch.setattr(BlockTaker, "_commit", slow_commit)
    extract_in(2, clips, tmp_path / "cache")
    assert came_on.is_set()


def test_clips_are_decoded_ahead_beside_another_job(
    motions: Path, tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job holds the last block; the device's first batch waits until the clips of the second are asked for."""
    clips, cache = load_clips(motions), tmp_path / "cache"
    job = small_job(clips, cache)
    create_cache(cache, job.spec, clips.clips, origin={}, created_with={})
    others = LockWatcher(cache / LOCKS_NAME).take(job.spec.num_blocks - 1)
    assert others is not None
    second_begun, prepare = threading.Event(), BlockExtractor._prepare

    def noted(extractor: BlockExtractor, rows: list[int]):
        if rows[0] >= BLOCK_CLIPS:
            second_begun.set()
        return prepare(extractor, rows)

    def held(frames: torch.Tensor) -> None:
        if not device.batches:
            assert second_begun.wait(60)
            others.release()

    monkeypatch.setattr(BlockExtractor, "_prepare", noted)
    device.before = held
    result, _, _ = extract_in(2, clips, cache)
    assert result.clips_done_here == len(clips.clips)


def test_a_pipeline_that_is_closed_ends_whatever_its_threads_wait_for(motions: Path) -> None:
    clips = load_clips(motions)
    tower = small_tower(motions)
    spec = small_spec(clips, tower)
    go_on = threading.Event()

    def waits():
        go_on.wait(60)
        yield from ()

    pipeline = DevicePipeline(
        Backbone(tower.visual, spec.stored_layers),
        spec,
        device=torch.device("cpu"),
        batch=1,
        waited=StageSeconds(),
    )
    pipeline.add(waits(), lambda clip: None)
    threading.Timer(0.05, go_on.set).start()
    pipeline.close()
    assert not any(thread.is_alive() for thread in pipeline._threads) and pipeline.failure is None
