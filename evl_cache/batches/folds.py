"""Which clips of two sources are trained on and which are scored."""

from collections.abc import Sequence

import numpy as np

from evl_cache.batches.source import Source
from evl_cache.clips import select
from evl_cache.errors import UsageError


def split_clips(
    train: Source, val: Source, *, train_names: Sequence[str] | None, val_names: Sequence[str] | None
) -> tuple[list[int] | None, list[int] | None]:
    """Return the rows of the clips to train on and of those to validate on; None is all of them.

    If both caches hold the same clips (one cache twice, or other views of it), what one side names is left out of
    the other.

    Raises: UsageError for a name that is no clip's, or one that is on both sides.
    """
    train_rows = None if train_names is None else select(train.clips, train_names, source="--train-clips")
    val_rows = None if val_names is None else select(val.clips, val_names, source="--val-clips")
    if train.spec.content_id != val.spec.content_id:
        return train_rows, val_rows
    count = len(train.clips)
    if train_rows is None and val_rows is not None:
        train_rows = np.flatnonzero(~_mask(val_rows, count)).tolist()
    elif val_rows is None and train_rows is not None:
        val_rows = np.flatnonzero(~_mask(train_rows, count)).tolist()
    elif train_rows is not None and val_rows is not None:
        both = np.flatnonzero(_mask(train_rows, count) & _mask(val_rows, count)).tolist()
        if both:
            raise UsageError(
                f"{train.clips[both[0]].id!r} and {len(both) - 1} more are in --train-clips and in --val-clips; keep "
                "them apart"
            )
    return train_rows, val_rows


def _mask(rows: Sequence[int], count: int) -> np.ndarray:
    """Return which of `count` rows are named, bool."""
    mask = np.zeros(count, dtype=bool)
    mask[np.asarray(rows, dtype=np.int64)] = True
    return mask
