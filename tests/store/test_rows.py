"""Rows made of whole batches: as of each sample alone, and errors that name what was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.support.fake_cuda import Counting, fake_cuda
from evl_cache import quantize
from evl_cache.clips import ClipList
from evl_cache.errors import ClipError
from evl_cache.spec import CacheSpec
from evl_cache.store import FeaturesOverflow, make_row, make_rows
from evl_cache.store.format import row_making
from evl_cache.store.format.row_making import begin_rows
from tests.support.feature_caches import TOWER, VIEWS, clip_list
from tests.support.plain_codes import plain_map_codes, plain_token_codes
from tests.support.watched_cuda import Watched

T, P, C, LAYERS = VIEWS.frames, 4, TOWER.width, (2, 3, 4)


def spec_of(*, tokens: str = "int8", maps: str = "uint8", compute_dtype: str = "float32") -> CacheSpec:
    clips: ClipList = clip_list([0, 1], classes=2)
    return CacheSpec(
        dataset="test",
        split="train",
        classes=clips.classes,
        tower=TOWER,
        views=VIEWS,
        layers=LAYERS,
        tokens=tokens,
        maps=maps,
        codec="default",
        compute_dtype=compute_dtype,
        pixels="pixels",
        frame_rule=1,
        num_clips=2,
        content_id=clips.content_id,
        block_clips=2,
    )


def batch_of(samples: int, *, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(samples, T, 1 + P, C, generator=generator) * 3 for _ in LAYERS]
    tokens[1][:, 1, 2] *= 20  # outlier tokens
    maps = [torch.randn(samples, 2, T - 1, P, P, generator=generator).softmax(-1) for _ in LAYERS]
    return tokens, maps


@pytest.mark.parametrize("stored", ["int8", "fp16"])
@pytest.mark.parametrize("maps_stored", ["uint8", "fp16", "none"])
def test_rows_of_a_batch_are_those_of_its_samples(stored: str, maps_stored: str) -> None:
    spec = spec_of(tokens=stored, maps=maps_stored)
    tokens, maps = batch_of(3)
    rows = make_rows(tokens, maps if spec.stores_maps else None, spec)
    assert len(rows) == 3
    for sample, row in enumerate(rows):
        assert not isinstance(row, ClipError)
        alone = make_row([t[sample] for t in tokens], [m[sample] for m in maps], spec)
        assert row.keys() == alone.keys()
        for name, value in row.items():
            assert value.dtype == alone[name].dtype and np.array_equal(value, alone[name])
            assert all(chunk.flags.c_contiguous for chunk in value)


@pytest.mark.parametrize("stored", ["int8", "fp16"])
@pytest.mark.parametrize("maps_stored", ["uint8", "fp16", "none"])
@pytest.mark.parametrize("samples_at_once", [1, 2, 5])
def test_rows_packed_as_on_a_gpu_are_the_same(
    stored: str, maps_stored: str, samples_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tokens=stored, maps=maps_stored)
    tokens, maps = batch_of(5)
    maps[0][3, 0, 1, 2, 0] = -1.0
    tokens[1][1, 0, 1, 0] = float("nan")
    per_sample = len(LAYERS) * tokens[0][0].numel()
    monkeypatch.setattr(quantize, "DEVICE_PASS_VALUES", samples_at_once * per_sample)
    stored_maps = maps if spec.stores_maps else []
    assert len(begin_rows(tokens, stored_maps, spec)) == -(-5 // samples_at_once)
    expected = make_rows(tokens, stored_maps or None, spec)
    monkeypatch.setattr(row_making, "_on_cpu", begin_rows)
    found = make_rows(tokens, stored_maps or None, spec)
    assert [isinstance(row, ClipError) for row in found] == [
        False,
        True,
        False,
        maps_stored == "uint8",
        False,
    ]
    for row, before in zip(found, expected, strict=True):
        if isinstance(row, ClipError) or isinstance(before, ClipError):
            assert str(row) == str(before)
            continue
        assert row.keys() == before.keys()
        for name, value in row.items():
            assert value.flags.c_contiguous and value.dtype == before[name].dtype
            assert np.array_equal(value, before[name])


def launches(samples: int, spec: CacheSpec) -> tuple[Counting, list[str]]:
    """What rows of ViT-B/16 with five layers start on a GPU, and what copies from it to the processor there were."""
    with fake_cuda() as device, device:
        tokens = [torch.empty(samples, 8, 197, 768) for _ in range(5)]
        maps = [torch.empty(samples, 2, 7, 196, 196) for _ in range(5)]
        with torch.device("cpu"), Watched() as watched, Counting() as counting:
            begin_rows(tokens, maps, spec)
    return counting, watched.to_host


def test_rows_of_a_batch_start_few_operations_on_a_gpu_and_wait_for_none() -> None:
    # It was 107 operations and nine waits for every sample. Three times what 11 samples at once take:
    batch, to_host = launches(32, spec_of())
    assert batch.launches <= 260
    assert to_host == ["aten.copy_.default"] * 3  # each into page-locked memory; nothing that waits


def test_a_batch_of_none_has_no_rows() -> None:
    tokens, maps = batch_of(1)
    assert make_rows([t[:0] for t in tokens], [m[:0] for m in maps], spec_of()) == []
    assert begin_rows([t[:0] for t in tokens], [m[:0] for m in maps], spec_of()) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_large_features_are_the_same_for_any_number_of_threads(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(2, 4, 50, 192, generator=generator) for _ in LAYERS]
    maps = [torch.randn(2, 2, 3, 49, 49, generator=generator).softmax(-1) for _ in LAYERS]
    monkeypatch.setattr(
        quantize, "CPU_ROWS_VALUES", 1000
    )  # a thread's chunk has parts, which it makes itself
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = make_rows(tokens, maps, spec_of())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for sample, row in enumerate(rows):
        assert not isinstance(row, ClipError)
        codes, affine, scale = plain_token_codes(torch.stack([t[sample] for t in tokens]))
        map_codes, map_scale, _ = plain_map_codes(torch.stack([m[sample] for m in maps]))
        expected = {
            "class_tokens": torch.stack([t[sample, :, 0] for t in tokens]).half(),
            "tokens": codes,
            "token_affine": affine,
            "token_scale": scale,
            "maps": map_codes,
            "map_scale": map_scale,
        }
        assert list(row) == list(expected)
        assert all(np.array_equal(row[name], value.numpy()) for name, value in expected.items())


@pytest.mark.gpu
def test_rows_made_on_a_gpu_are_its_quantised_features() -> None:
    tokens, maps = batch_of(3)
    maps[1][1, 0, 0, 0, 0] = float("nan")
    rows = make_rows([t.cuda() for t in tokens], [m.cuda() for m in maps], spec_of())
    assert [isinstance(row, ClipError) for row in rows] == [False, True, False]
    for sample in (0, 2):
        row = rows[sample]
        assert not isinstance(row, ClipError)
        stored = quantize.quantize_tokens(torch.stack([t[sample] for t in tokens]))
        assert np.abs(row["tokens"].astype(int) - stored.codes.numpy().astype(int)).max() <= 1
        assert np.allclose(row["token_affine"], stored.affine.numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("stored", ["int8", "fp16"])
def test_a_sample_that_cannot_be_stored_leaves_the_others_alone(bad: float, stored: str) -> None:
    spec = spec_of(tokens=stored)
    tokens, maps = batch_of(3)
    expected = make_rows(tokens, maps, spec)
    tokens[2][1, 1, 3, 5] = bad
    failed, found = make_rows(tokens, maps, spec)[1], make_rows(tokens, maps, spec)[::2]
    assert isinstance(failed, ClipError) and not isinstance(failed, FeaturesOverflow)
    with pytest.raises(ClipError) as alone:
        make_row([t[1] for t in tokens], [m[1] for m in maps], spec)
    assert str(failed) == str(alone.value) and str(failed).startswith("tokens at index (2,")
    for row, before in zip(found, expected[::2], strict=True):
        assert not isinstance(row, ClipError) and not isinstance(before, ClipError)
        assert all(np.array_equal(row[name], before[name]) for name in before)


@pytest.mark.parametrize("bad", [float("nan"), -0.5])
def test_a_map_that_cannot_be_stored_names_its_row(bad: float) -> None:
    tokens, maps = batch_of(2)
    maps[1][0, 1, 0, 2, 3] = bad
    failed, other = make_rows(tokens, maps, spec_of())
    assert isinstance(failed, ClipError) and not isinstance(other, ClipError)
    assert str(failed).startswith("attention maps at index (1, 1, 0, 2) cannot be stored")


@pytest.mark.parametrize("where", ["class token", "token", "map"])
@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16", "float32"])
def test_features_that_overflow_in_float16_name_the_dtype_that_holds_them(
    where: str, compute_dtype: str
) -> None:
    tokens, maps = batch_of(2)
    if where == "map":
        maps[0][1, 0, 0, 0, 0] = float("nan")
    else:
        tokens[0][1, 0, 0 if where == "class token" else 1, 0] = float("inf")
    other, failed = make_rows(tokens, maps, spec_of(compute_dtype=compute_dtype))
    assert not isinstance(other, ClipError) and isinstance(failed, ClipError)
    assert isinstance(failed, FeaturesOverflow) == (compute_dtype == "float16")
    assert ("--compute-dtype bfloat16" in str(failed)) == (compute_dtype == "float16")
    assert "\n" not in str(failed)


def test_a_finite_value_that_codes_cannot_span_is_no_overflow_of_float16() -> None:
    spec = spec_of(compute_dtype="float16")
    tokens, maps = batch_of(1)
    tokens[0][0, 1, 1] *= 1e6  # finite, but its scale is not
    (failed,) = make_rows(tokens, maps, spec)
    assert isinstance(failed, ClipError) and not isinstance(failed, FeaturesOverflow)
