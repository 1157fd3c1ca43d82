"""Which clips of two sources are trained on and which are scored."""

from collections.abc import Sequence

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
    rows = range(len(train.clips))
    if train_rows is None and val_rows is not None:
        train_rows = sorted(set(rows) - set(val_rows))
    elif val_rows is None and train_rows is not None:
        val_rows = sorted(set(rows) - set(train_rows))
    elif train_rows is not None and val_rows is not None:
        both = [train.clips[row].id for row in sorted(set(train_rows) & set(val_rows))]
        if both:
            raise UsageError(
                f"{both[0]!r} and {len(both) - 1} more are in --train-clips and in --val-clips; keep them apart"
            )
    return train_rows, val_rows
