"""Which frames are taken, against twins written word by word from the rules."""

import numpy as np
import pytest

from evl_cache.errors import ClipError, UsageError
from evl_cache.extract_options import VIEW_RECIPES
from evl_cache.sampling import strided_test_views, strided_train_view, tsn_test_views, tsn_train_view

LENGTHS = [*range(1, 60), *range(60, 400, 17), 399, 400]
SHAPES = [(1, 1), (1, 16), (2, 3), (4, 7), (8, 1), (8, 4), (8, 16), (16, 16), (32, 8), (3, 150)]  # (T, s)


def slow_strided_views(n, T, s, V):
    """Pad the list of frames with its last one, then cut V windows."""
    frames = list(range(n))
    while len(frames) < s * (T - 1) + 1:
        frames.append(n - 1)
    slack = len(frames) - (s * (T - 1) + 1)
    views = []
    for v in range(V):
        start = slack // 2 if V == 1 else round(slack / (V - 1) * v)
        views.append([frames[start + i * s] for i in range(T)])
    return views


def slow_tsn_views(n, T, V):
    return [[((2 * i * V + 2 * v + 1) * n) // (2 * V * T) for i in range(T)] for v in range(V)]


@pytest.mark.parametrize("views", [1, 2, 3, 4, 10])
def test_strided_test_views_equal_the_written_rule(views):
    for n in LENGTHS:
        for frames, stride in SHAPES:
            found = strided_test_views(n, frames=frames, stride=stride, views=views)
            assert found.dtype == np.int64 and found.shape == (views, frames)
            assert found.tolist() == slow_strided_views(n, frames, stride, views), (n, frames, stride)


@pytest.mark.parametrize("name", VIEW_RECIPES)
def test_every_recipe_at_every_length_to_400(name):
    recipe = VIEW_RECIPES[name]
    frames, views, stride = recipe["frames"], int(recipe["views"].split("x")[0]), recipe.get("stride")
    for n in range(1, 401):
        if stride is None:
            assert tsn_test_views(n, frames=frames, views=views).tolist() == slow_tsn_views(n, frames, views)
            continue
        found = strided_test_views(n, frames=frames, stride=stride, views=views)
        assert found.tolist() == slow_strided_views(n, frames, stride, views)


def test_known_figures_of_strided_views():
    assert strided_test_views(300, frames=8, stride=16, views=3)[:, 0].tolist() == [0, 94, 187]
    assert strided_test_views(10, frames=4, stride=4, views=1).tolist() == [[0, 4, 8, 9]]


def test_start_is_rounded_half_to_even():
    # slack 5, three views: 2.5 becomes 2, where rounding half up gives 3
    assert strided_test_views(6, frames=1, stride=1, views=3).tolist() == [[0], [2], [5]]


@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_tsn_test_views_equal_the_written_rule_and_stay_inside(views):
    for n in LENGTHS:
        for frames in (1, 3, 8, 16):
            found = tsn_test_views(n, frames=frames, views=views)
            assert found.tolist() == slow_tsn_views(n, frames, views)
            assert found.min() >= 0 and found.max() < n


def test_tsn_views_of_a_long_file_share_no_frame():
    found = tsn_test_views(300, frames=8, views=3)
    assert len(set(found.flatten().tolist())) == 24


@pytest.mark.parametrize(("frames", "stride"), SHAPES)
def test_strided_training_view_is_in_bounds_and_padded_as_written(frames, stride):
    rng = np.random.default_rng(1)
    for n in LENGTHS:
        found = strided_train_view(n, frames=frames, stride=stride, rng=rng).tolist()
        if stride * (frames - 1) + 1 >= n:
            inside = [i * stride for i in range(frames) if i * stride < n]
            assert found == [i * stride if i * stride < n else inside[-1] for i in range(frames)]
        else:
            assert 0 <= found[0] <= n - stride * (frames - 1) - 1
            assert np.diff(found).tolist() == [stride] * (frames - 1)
            assert found[-1] < n


def test_strided_training_starts_are_uniform_and_reach_both_ends():
    rng = np.random.default_rng(2)
    starts = [int(strided_train_view(20, frames=4, stride=4, rng=rng)[0]) for _ in range(4000)]
    counts = np.bincount(starts)
    assert len(counts) == 20 - 4 * 3  # 0 .. n-s(T-1)-1, both included
    assert counts.min() > 400 and counts.max() < 600  # 500 each, standard deviation 21


def test_tsn_training_frames_lie_in_their_segments_and_reach_their_ends():
    rng = np.random.default_rng(3)
    for n in (1, 2, 7, 8, 9, 30, 31, 250):
        gap = (n - 1) / 8
        drawn = np.stack([tsn_train_view(n, frames=8, rng=rng) for _ in range(600)])
        assert drawn.dtype == np.int64 and drawn.max() < n
        for i in range(8):
            low, high = round(gap * i), round(gap * (i + 1))
            assert drawn[:, i].min() >= low and drawn[:, i].max() <= high
            if high - low < 8:
                assert {low, high} <= set(drawn[:, i].tolist())


def test_training_views_follow_their_seed():
    def views(seed):
        rng = np.random.default_rng(seed)
        strided = [strided_train_view(300, frames=8, stride=8, rng=rng).tolist() for _ in range(5)]
        return strided, [tsn_train_view(300, frames=8, rng=rng).tolist() for _ in range(5)]

    assert views(5) == views(5)
    assert views(5) != views(6)


def test_an_empty_file_is_a_failed_clip_and_a_count_of_zero_is_a_mistake():
    rng = np.random.default_rng(0)
    for sample in (
        lambda n: strided_test_views(n, frames=8, stride=4),
        lambda n: tsn_test_views(n, frames=8),
        lambda n: strided_train_view(n, frames=8, stride=4, rng=rng),
        lambda n: tsn_train_view(n, frames=8, rng=rng),
    ):
        with pytest.raises(ClipError, match="0 frames"):
            sample(0)
    with pytest.raises(UsageError, match="stride is 0"):
        strided_test_views(9, frames=8, stride=0)
    with pytest.raises(UsageError, match="views is 0"):
        tsn_test_views(9, frames=8, views=0)
    with pytest.raises(UsageError, match="frames is 0"):
        tsn_train_view(9, frames=0, rng=rng)


@pytest.mark.parametrize("name", VIEW_RECIPES)
def test_training_frames_of_every_recipe_at_every_length_to_400(name):
    recipe = VIEW_RECIPES[name]
    frames, stride = recipe["frames"], recipe.get("stride")
    for n in range(1, 401):
        for seed in range(2):
            if stride is None:
                found = tsn_train_view(n, frames=frames, rng=np.random.default_rng(seed)).tolist()
                bounds = [
                    (round((n - 1) / frames * i), round((n - 1) / frames * (i + 1))) for i in range(frames)
                ]
                assert all(low <= index <= high for index, (low, high) in zip(found, bounds, strict=True)), n
                continue
            found = strided_train_view(
                n, frames=frames, stride=stride, rng=np.random.default_rng(seed)
            ).tolist()
            if stride * (frames - 1) + 1 >= n:
                below = [i * stride for i in range(frames) if i * stride < n]
                assert found == below + [below[-1]] * (frames - len(below)), n
            else:
                start = found[0]
                assert 0 <= start <= n - stride * (frames - 1) - 1
                assert found == list(range(start, start + stride * frames, stride)), n
