"""What nobody names goes by the machine: workers, batch. What decides bytes is in the marks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evl_cache.errors import UsageError
from evl_cache.extract import ExtractOptions, defaults, environment
from evl_cache.extract.defaults import (
    WORKER_NBYTES,
    Workers,
    batch_for,
    default_batch,
    default_workers,
    pass_nbytes,
    workers_for,
)
from evl_cache.extract.environment import run_environment
from evl_cache.precision import tf32_as
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.video import DecodeOptions
from tests.support.feature_caches import TOWER

GB = 1 << 30
CARD = 80 * GB
B16 = {"image_size": 224, "patch_size": 16, "width": 768, "blocks": 12}
L14 = {"image_size": 224, "patch_size": 14, "width": 1024, "blocks": 24}
L14_336 = {**L14, "image_size": 336}


def spec(frames: int = 8, *, tower: dict[str, int] = B16, layers: int = 4, **changes: Any) -> CacheSpec:
    blocks = tower["blocks"]
    given: dict[str, Any] = {
        "dataset": "d", "split": "train", "classes": ("a",), "tower": replace(TOWER, **tower),
        "views": ViewSpec(frames=frames), "layers": tuple(range(blocks - layers + 1, blocks + 1)),
        "tokens": "int8", "maps": "uint8", "compute_dtype": "float16", "num_clips": 100,
        "content_id": "0" * 64, "block_clips": 64,
    }  # fmt: skip
    return CacheSpec(**given | changes)


# Workers


@pytest.mark.parametrize(
    ("device", "processors", "memory", "workers"),
    [
        ("cpu", 1, 64 * GB, (1, 1)),
        ("cpu", 2, 64 * GB, (2, 2)),
        ("cpu", 64, 64 * GB, (2, 2)),
        ("cuda", 1, 64 * GB, (1, 2)),
        ("cuda:3", 16, 64 * GB, (16, 8)),
        ("cuda", 192, 256 * GB, (64, 96)),
        ("cuda", 16, 2 * GB, (8, 8)),  # as many as memory has room for
        ("cuda", 16, 0, (1, 8)),
    ],
)
def test_workers_are_as_many_as_the_machine_has_room_for(
    device: str, processors: int, memory: int, workers: tuple[int, int]
) -> None:
    found = default_workers(device, processors=processors, memory_nbytes=memory)
    assert (found.decoding, found.compressing) == workers


def test_large_clips_leave_room_for_fewer_workers() -> None:
    found = default_workers("cuda", processors=16, memory_nbytes=8 * WORKER_NBYTES, clip_nbytes=WORKER_NBYTES)
    assert found.decoding == 4


def test_few_processes_have_a_context_on_the_gpu() -> None:
    found = default_workers("cuda", processors=16, memory_nbytes=64 * GB, decodes_on_device=True)
    assert found == Workers(decoding=2, compressing=8)


def test_workers_that_are_named_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "processor_share", lambda: 12)
    monkeypatch.setattr(defaults, "available_bytes", lambda device: 64 * GB)

    def found(**options: Any) -> tuple[int, int]:
        workers = workers_for(ExtractOptions(**options), spec())
        return workers.decoding, workers.compressing

    assert found(device="cuda") == (12, 6)
    assert found(device="cuda", decode_workers=3) == (3, 6)
    assert found(device="cuda", compress_threads=1) == (12, 1)
    assert found() == (2, 2)
    assert found(decode_workers=5) == (5, 5)
    assert found(decode_workers=5, compress_threads=1) == (5, 1)


def test_processes_of_a_computer_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "processor_share", lambda: 12)
    monkeypatch.setattr(defaults, "local_processes", lambda: 8)
    monkeypatch.setattr(defaults, "available_bytes", lambda device: 8 * 4 * GB)
    one_clip = spec(1, tower=dict(B16, image_size=32))
    assert workers_for(ExtractOptions(device="cuda"), one_clip).decoding == 11  # 0.7 of 4 GB


@pytest.mark.parametrize("name", ["batch", "decode_workers", "compress_threads"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0; expected at least 1"):
        ExtractOptions(**{name: 0})


# Batch


@pytest.mark.parametrize(
    ("device", "tower", "frames", "total", "batch"),
    [
        ("cpu", B16, 8, 0, 8),
        ("cuda", B16, 8, CARD, 32),
        ("cuda", L14, 8, CARD, 32),
        ("cuda", L14, 16, CARD, 16),
        ("cuda", L14, 32, CARD, 8),
        ("cuda", L14_336, 8, CARD, 8),
        ("cuda", L14_336, 128, CARD, 1),  # more tokens than wanted in a single sample
        ("cuda", dict(B16, patch_size=32), 8, CARD, 64),  # a usual block
        ("cuda", B16, 8, 8 * GB, 32),
        ("cuda", L14, 8, 8 * GB, 16),
        ("cuda", L14, 8, 1 * GB, 2),
        ("cuda", L14, 8, 1, 1),
    ],
)
def test_a_batch_goes_by_tokens_and_by_the_devices_memory(
    device: str, tower: dict[str, int], frames: int, total: int, batch: int
) -> None:
    assert default_batch(device, spec(frames, tower=tower), total) == batch


def test_more_layers_and_float32_take_more_memory() -> None:
    usual = pass_nbytes(spec(), 32)
    assert pass_nbytes(spec(layers=12), 32) > usual
    assert pass_nbytes(spec(compute_dtype="float32"), 32) > usual
    assert pass_nbytes(spec(maps="none"), 32) < usual
    assert pass_nbytes(spec(), 64) == 2 * usual


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = CARD

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)


@pytest.mark.usefixtures("card")
def test_a_batch_that_is_named_is_taken_up_to_a_block() -> None:
    assert batch_for(ExtractOptions(device="cuda"), spec()) == 32
    assert batch_for(ExtractOptions(device="cuda", batch=48), spec()) == 48
    assert batch_for(ExtractOptions(device="cuda", batch=100), spec()) == 64
    assert [batch_for(ExtractOptions(**given), spec()) for given in ({}, {"batch": 3})] == [8, 3]


@pytest.mark.parametrize(("views", "clips", "batch"), [(3, 21, 32), (10, 6, 30), (40, 1, 20), (100, 1, 25)])
@pytest.mark.usefixtures("card")
def test_passes_on_a_gpu_share_out_a_block_with_next_to_no_padding(
    views: int, clips: int, batch: int
) -> None:
    given = spec(views=ViewSpec(temporal_views=views), block_clips=clips)
    assert batch_for(ExtractOptions(device="cuda"), given) == batch
    assert -(views * clips) % batch <= 1


# Marks


def test_on_a_cpu_a_mark_tells_what_it_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_environment(ExtractOptions(), spec(compute_dtype="float32"), batch=7)
    assert found.keys() == {"batch", "device", "compute_dtype", "threads", "versions"}
    assert found["batch"] == 7 and found["threads"] == torch.get_num_threads()
    assert found["versions"].keys() == {"evl-cache", "torch", "open_clip_torch", "numpy", "numcodecs"}


def test_on_a_gpu_a_mark_tells_of_tf32_and_of_the_processor_that_made_the_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    options = ExtractOptions(device="cuda")
    found = run_environment(options, spec(), batch=32)
    assert found.keys() == {"batch", "device", "compute_dtype", "pixels_by", "versions"}
    assert (found["device"], found["pixels_by"]) == ("A card", "cpu AVX2, several threads")
    in_float32 = spec(compute_dtype="float32")
    assert run_environment(options, in_float32, batch=32)["tf32"]["matmul"] is False
    for precision, is_on in (("tf32", True), ("float32", False)):
        with tf32_as(precision, "cuda"):
            found = run_environment(options, in_float32, batch=32)
        assert found["tf32"] == {"matmul": is_on, "convolution": is_on}


class OfTimm(nn.Module):
    __module__ = "timm.models.eva"


def test_a_mark_tells_versions_of_what_was_used() -> None:
    def beside(visual: nn.Module | None = None, **views: Any) -> set[str]:
        made = spec(views=ViewSpec(**views))
        found = run_environment(ExtractOptions(), made, batch=8, visual=visual)["versions"]
        assert "unknown" not in found.values()
        return found.keys() - set(environment._PACKAGES)

    assert beside(nn.Sequential(nn.Linear(1, 1))) == set()
    assert beside(nn.Sequential(OfTimm())) == {"timm"}
    assert beside(train_views=2) == {"timm", "Pillow"}


def test_torchcodec_on_the_gpu_is_told_by_the_decoding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(defaults, "processor_share", lambda: 12)
    monkeypatch.setattr(defaults, "available_bytes", lambda device: 64 * GB)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for where, expected in (("cuda:1", 2), ("cpu", 12)):
        decoding = DecodeOptions(decoder="torchcodec", device=where)
        options = ExtractOptions(device="cuda", decoding=decoding)
        assert workers_for(options, spec()).decoding == expected
