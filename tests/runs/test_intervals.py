"""How sure an accuracy is: Wilson's interval against its definition and published figures."""

import math

import pytest

from evl_cache.runs.intervals import deviation_of, spread_text, wilson_interval


@pytest.mark.parametrize(
    ("right", "clips", "expected"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I: method 3
        (81, 263, (25.53, 36.62)),
        (15, 148, (6.24, 16.05)),
        (0, 20, (0.00, 16.11)),
        (1, 29, (0.61, 17.18)),
    ],
)
def test_the_interval_is_the_published_one(right, clips, expected):
    assert wilson_interval(100 * right / clips, clips) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("clips", [1, 5, 100, 10_000])
def test_at_its_ends_the_accuracy_is_one_deviation_of_the_ends_away(clips):
    for right in range(0, clips + 1, max(1, clips // 7)):
        share = right / clips
        low, high = (end / 100 for end in wilson_interval(100 * share, clips))
        assert 0 <= low <= share <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(
                    1.959964 * math.sqrt(end * (1 - end) / clips), abs=1e-6
                )


def test_no_clip_says_nothing_and_one_run_has_no_deviation():
    assert wilson_interval(0.0, 0) == (0.0, 100.0)
    assert wilson_interval(0.0, 5)[0] == 0.0 and wilson_interval(100.0, 5)[1] == 100.0
    assert deviation_of([3.0]) is None and deviation_of([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert spread_text(1.25, None, digits=2) == " ± 1.25" and spread_text(None, None) == ""
    assert spread_text(None, (36.06, 97.0)) == " (36.1 to 97.0)"
