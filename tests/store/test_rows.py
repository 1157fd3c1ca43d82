"""Rows made of whole batches: as of each sample alone, and errors that name what was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evl_cache.clips import ClipList
from evl_cache.errors import ClipError
from evl_cache.spec import CacheSpec
from evl_cache.store import FeaturesOverflow, make_row, make_rows
from tests.support.feature_caches import TOWER, VIEWS, clip_list

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
