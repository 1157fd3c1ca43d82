"""Numbers of samples, clips and layers as users give them."""

import re
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from evl_cache.errors import EvlCacheError, UsageError
from evl_cache.notation import layer_set, layers_of
from evl_cache.store.reading.indices import row_of, rows_of


def rows(wanted: Any, count: int = 5) -> list[int]:
    found = rows_of(wanted, count, what="sample", place="caches/a")
    assert found.dtype == np.int64 and found.ndim == 1
    return found.tolist()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([3, 0, 3], [3, 0, 3]),
        ((1,), [1]),
        ([], []),
        (deque([2, 4]), [2, 4]),
        (range(4, 0, -2), [4, 2]),
        (np.array([4, 1], dtype=np.uint8), [4, 1]),
        (np.array([2], dtype=np.uint64), [2]),
        (np.array([]), []),
        (np.array([1, 2], dtype=object), [1, 2]),
        (torch.tensor([3, 2], dtype=torch.int32), [3, 2]),
        ([np.int16(1), torch.tensor(2), 3], [1, 2, 3]),
        (2, [2]),
        (np.int64(2), [2]),
        (np.array(2), [2]),
        (torch.tensor(2), [2]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(1, 99, 2), [1, 3]),
        (slice(-2, None), [3, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        ([True, False, False, True, False], [0, 3]),
        (np.array([False] * 4 + [True]), [4]),
        (torch.tensor([True, True, False, False, False]), [0, 1]),
        (np.zeros(5, dtype=bool), []),
    ],
)
def test_whole_numbers_slices_and_masks_of_full_length_are_rows(wanted: Any, expected: list[int]) -> None:
    assert rows(wanted) == expected


class Index:
    def __index__(self) -> int:
        return 3


def test_what_python_takes_for_an_index_is_a_row() -> None:
    assert rows(Index()) == [3] and rows([Index(), 0]) == [3, 0]
    assert row_of(Index(), 5, what="sample", place="a") == 3


@pytest.mark.parametrize(
    "wanted",
    [
        [0.7],
        [1.0],
        1.0,
        np.array([0.0, 1.0]),
        torch.tensor([1.0]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        ["1"],
        "1",
        b"\x01",
        {0, 1},
        {0: 1},
        iter([0]),
        None,
        [None],
        [[0]],
        np.zeros((1, 1), dtype=int),
        torch.zeros(2, 2, dtype=torch.long),
        True,
        np.bool_(False),
        np.array(True),
        torch.tensor(True),
        [True, 1],
        [1, np.True_],
        [torch.tensor(True), 0],
        slice(0.0, 1.0),
        slice(0, 3, 0),
        ["a\nb"],
        [float("nan")],
        np.array(["0"]),
    ],
)
def test_all_else_is_one_line_that_says_what_was_got_and_what_is_expected(wanted: Any) -> None:
    expected = "expected whole numbers from 0 to 4, a slice, or a mask of 5 truth values"
    with pytest.raises(UsageError, match=re.escape(expected)) as raised:
        rows(wanted)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("caches/a: samples ")


@pytest.mark.parametrize("wanted", [5, -1, [0, -1], [0, 5], np.array([2**63], dtype=np.uint64), [10**30]])
def test_numbers_that_are_not_there_are_named(wanted: Any) -> None:
    with pytest.raises(UsageError, match=r"^sample -?\d+ of caches/a; expected 0 to 4$"):
        rows(wanted)


@pytest.mark.parametrize("mask", [[True], np.zeros(4, dtype=bool), torch.ones(6, dtype=torch.bool)])
def test_a_mask_of_another_length_is_refused(mask: Any) -> None:
    with pytest.raises(UsageError, match=r"a mask of \d truth values for samples; expected 5 of them"):
        rows(mask)


@pytest.mark.parametrize("wanted", [0.0, "0", True, np.True_, None, [0], torch.tensor(False), 5, -1])
def test_one_row_is_one_whole_number(wanted: Any) -> None:
    with pytest.raises(UsageError):
        row_of(wanted, 5, what="sample", place="a")


def test_layers_are_given_shallow_to_deep() -> None:
    assert layers_of([7, 8]) == layers_of(np.array([7, 8])) == layers_of(range(7, 9)) == (7, 8)
    assert layers_of(8) == layers_of((8,)) == (8,)
    with pytest.raises(
        UsageError, match=re.escape("layers [8, 7]; expected shallow to deep, each once: (7, 8)")
    ):
        layers_of((8, 7))
    for wanted in ((7, 7), ()):
        with pytest.raises(UsageError, match="layers"):
            layers_of(wanted)


@pytest.mark.parametrize("read", [layers_of, layer_set])
@pytest.mark.parametrize("wanted", [(7.0,), "78", {7, 8}, (True, False), None, ("7",), slice(0, 2)])
def test_layers_are_whole_numbers(read: Callable[[Any], object], wanted: Any) -> None:
    with pytest.raises(EvlCacheError, match="expected whole numbers"):
        read(wanted)


def test_a_set_of_layers_may_come_in_any_order() -> None:
    assert layer_set((8, 7, 8)) == (7, 8) and layer_set(()) == ()
