"""`--stride auto` spreads a view over its clip: against a loop that looks for the stride, and from option to cache."""

import json
from dataclasses import replace

import numpy as np
import pytest

from evl_cache.errors import CacheError, UsageError
from evl_cache.extract.prepare import choose_frames
from evl_cache.extract.recipes import ViewChoice
from evl_cache.sampling import strided_test_views, strided_train_view
from evl_cache.spec import CacheSpec, ViewSpec
from tests.test_spec import SPEC

LENGTHS = (1, 2, 6, 7, 8, 9, 14, 15, 16, 45, 112, 113, 114, 300)


def slow_stride(n: int, T: int) -> int:
    """The largest step with which T frames are in the clip; 1 where there is none."""
    stride = 1
    while T > 1 and (stride + 1) * (T - 1) <= n - 1:
        stride += 1
    return stride


@pytest.mark.parametrize("T", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("V", [1, 2, 3])
def test_views_of_auto_are_those_of_the_largest_stride_that_fits(T: int, V: int) -> None:
    for n in (*LENGTHS, T, T + 1, max(1, T - 1)):
        found = strided_test_views(n, frames=T, stride="auto", views=V)
        s = slow_stride(n, T)
        slack = max(0, n - 1 - s * (T - 1))
        starts = [slack // 2] if V == 1 else [round(slack / (V - 1) * v) for v in range(V)]
        assert found.tolist() == [[min(start + i * s, n - 1) for i in range(T)] for start in starts], n
        assert n < T or all(len(set(view)) == T for view in found.tolist())


@pytest.mark.parametrize("T", [1, 8])
def test_training_views_of_auto_stay_in_the_clip_and_use_all_of_it(T: int) -> None:
    for n in LENGTHS:
        drawn = [
            strided_train_view(n, frames=T, stride="auto", rng=np.random.default_rng(seed)).tolist()
            for seed in range(40)
        ]
        s = slow_stride(n, T)
        assert all(view[0] >= 0 and view[-1] < n for view in drawn)
        if n >= T:
            assert all(view == [view[0] + i * s for i in range(T)] for view in drawn)
            assert len({view[0] for view in drawn}) > 1 or n - 1 - s * (T - 1) == 0


def test_auto_at_113_frames_is_the_default() -> None:
    assert np.array_equal(
        choose_frames(113, ViewSpec(stride="auto"), "a"), choose_frames(113, ViewSpec(), "a")
    )


def test_auto_is_part_of_what_a_cache_is_and_comes_back_from_json() -> None:
    usual, auto = (replace(SPEC, views=ViewSpec(frames=2, stride=s)) for s in (1, "auto"))
    assert usual.feature_id != auto.feature_id
    told = json.loads(json.dumps(auto.to_json()))
    assert told["views"]["stride"] == "auto" and CacheSpec.from_json(told) == auto


@pytest.mark.parametrize("stride", ["", "Auto", "16", "auto ", 0, -1, 1.5, True, [], 10**9])
def test_a_cache_whose_stride_was_edited_is_refused(stride: object) -> None:
    told = replace(SPEC, views=ViewSpec(frames=2, stride="auto")).to_json()
    told["views"]["stride"] = stride
    with pytest.raises(CacheError, match="stride"):
        CacheSpec.from_json(told)


def test_auto_with_tsn_is_refused_and_with_a_recipe_taken() -> None:
    with pytest.raises(UsageError, match="stride auto with tsn sampling"):
        ViewChoice(stride="auto", sampling="tsn").resolve({})
    with pytest.raises(UsageError, match="stride 'fast'; expected a number of frames, or auto"):
        ViewChoice(stride="fast").resolve({})
    assert ViewChoice(stride="auto", recipe="k400-8").resolve({})[0].stride == "auto"
