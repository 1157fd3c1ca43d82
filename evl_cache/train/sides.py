"""What a training says of its clips before it begins: those on both sides, and classes that it cannot learn."""

from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np

from evl_cache.batches import Source
from evl_cache.clips import Clip
from evl_cache.runs import match_classes, names_of

_MOST_NAMED = 3
_PARTS_READ_WHOLE = 4  # where a fourth of the clips or more are asked for, all are read


def notes_of_sides(caches: Sequence[Source], samples: Sequence[np.ndarray]) -> list[str]:
    """Return lines on clips that are trained on and scored, and on classes scored that no clip is trained on.

    Clips are told by the names of their files: of caches of other videos with the same names this is no fault, so it
    refuses nothing.

    Args:
        caches: to train on and to validate on; their classes fit.
        samples: of each side.
    """
    return [*_shared_clips(caches, samples), *_untrained_classes(caches, samples)]


def _shared_clips(caches: Sequence[Source], samples: Sequence[np.ndarray]) -> list[str]:
    train, val = caches
    rows = [np.unique(cache.sample_clips[of_side]) for cache, of_side in zip(caches, samples, strict=True)]
    if train.spec.content_id == val.spec.content_id:  # no list of a million clips is read for one cache
        shared = [clip.id for clip in _clips(val, np.intersect1d(rows[0], rows[1]))]
    else:
        trained = {name for clip in _clips(train, rows[0]) for name in names_of(clip)}
        shared = [clip.id for clip in _clips(val, rows[1]) if not trained.isdisjoint(names_of(clip))]
    if not shared:
        return []
    told = (
        f"note: {len(shared)} of {len(rows[1])} clips to validate on are trained on too, by their names ({_named(shared)}): "
        "the accuracy of them says little of others"
    )
    return [told]


def _clips(cache: Source, rows: np.ndarray) -> Iterator[Clip]:
    """Yield clips, whose rows ascend: of many all lines are read at once, in a third of the time of one each."""
    clips = cache.clips
    if len(rows) * _PARTS_READ_WHOLE < len(clips):
        return (clips[row] for row in rows.tolist())
    is_asked = np.zeros(len(clips), dtype=bool)
    is_asked[rows] = True
    return compress(clips, is_asked.tolist())


def _untrained_classes(caches: Sequence[Source], samples: Sequence[np.ndarray]) -> list[str]:
    train, val = caches
    match = match_classes(train.spec.classes, val.spec.classes)
    scored = np.unique(match.labels(val.labels[samples[1]]))
    missing = np.setdiff1d(scored, np.unique(train.labels[samples[0]])).tolist()
    if not missing:
        return []
    names = [train.spec.classes[label] for label in missing]
    told = (
        f"note: {len(missing)} of {len(scored)} classes to validate on have no clip to train on ({_named(names)}): a head "
        "cannot learn them"
    )
    return [told]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more
