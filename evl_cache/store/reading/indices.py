"""Rows of samples and clips as users give them, read in one way everywhere.

N things, numbered from 0.
"""

import reprlib
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch

from evl_cache.errors import UsageError
from evl_cache.notation import whole_number

# Whole numbers, one or several; a slice; or a mask of N truth values.
Indices = SupportsIndex | slice | Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor


def rows_of(wanted: Indices, count: int, *, what: str, place: str) -> np.ndarray:
    """Return the rows that indices name, int64 (M,), in their order.

    One number is a list of one. A slice is cut to what there is, as Python's are, and may count from the end; numbers
    may not.

    Args:
        wanted: what a user gave.
        count: N.
        what: the kind of thing, for messages: `sample` or `clip`.
        place: where they lie, for messages.

    Raises: UsageError for anything else, and for numbers below 0 or above N-1.
    """
    if isinstance(wanted, slice):
        try:
            return np.arange(count, dtype=np.int64)[wanted]
        except (TypeError, ValueError) as error:
            raise _refusal(wanted, count, what, place) from error
    found = _numbers(wanted)
    if found is None:
        raise _refusal(wanted, count, what, place)
    if found.dtype == bool:
        if len(found) != count:
            raise UsageError(
                f"{place}: a mask of {len(found)} truth values for {what}s; expected {count} of them, one for each {what}"
            )
        return np.flatnonzero(found)
    outside = found[(found < 0) | (found >= count)]
    if len(outside):
        raise UsageError(f"{what} {outside[0]} of {place}; expected 0 to {count - 1}")
    return found.astype(np.int64)


def row_of(wanted: SupportsIndex, count: int, *, what: str, place: str) -> int:
    """Return one row. Other arguments and errors as `rows_of`."""
    row = wanted if type(wanted) is int else whole_number(wanted)
    if row is None:
        raise _refusal(wanted, count, what, place)
    if not 0 <= row < count:
        raise UsageError(f"{what} {row} of {place}; expected 0 to {count - 1}")
    return row


def _refusal(wanted: object, count: int, what: str, place: str) -> UsageError:
    return UsageError(
        f"{place}: {what}s {_told(wanted)}; expected whole numbers from 0 to {count - 1}, a slice, or a mask of {count} "
        "truth values"
    )


def _numbers(wanted: Any) -> np.ndarray | None:
    """Return whole numbers, or truth values, in one dimension; None for anything else."""
    if isinstance(wanted, range):
        return np.arange(wanted.start, wanted.stop, wanted.step, dtype=np.int64)
    if isinstance(wanted, torch.Tensor):
        wanted = wanted.detach().cpu().numpy() if wanted.dtype != torch.bfloat16 else wanted.tolist()
    if hasattr(wanted, "__array__"):
        wanted = np.asarray(wanted)
        if wanted.ndim == 0 and wanted.dtype.kind in "iu":
            return np.atleast_1d(wanted)
        if wanted.ndim != 1:
            return None
        if wanted.dtype.kind in "iub":
            return wanted  # type: ignore[no-any-return]
        wanted = wanted.tolist()
    if isinstance(wanted, str | bytes | bytearray) or not isinstance(wanted, Sequence):
        one = whole_number(wanted)
        return None if one is None else _array([one])
    if wanted and all(isinstance(value, bool | np.bool_) for value in wanted):
        return np.asarray(wanted, dtype=bool)
    numbers = [whole_number(value) for value in wanted]
    return None if None in numbers else _array(numbers)


def _array(numbers: Sequence[int | None]) -> np.ndarray:
    try:
        return np.asarray(numbers, dtype=np.int64)
    except OverflowError:
        return np.asarray(numbers, dtype=object)  # compared as it is, and found to be outside


def _told(wanted: object) -> str:
    """Return what a user gave, in a few words."""
    if isinstance(wanted, np.ndarray | torch.Tensor):
        return f"are an array of {str(wanted.dtype).removeprefix('torch.')} {tuple(wanted.shape)}"
    return reprlib.repr(wanted)
