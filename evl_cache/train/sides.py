"""What a training says of its clips before it begins: those on both sides, and classes that it cannot learn."""

from collections.abc import Sequence

import numpy as np

from evl_cache.batches import Source
from evl_cache.runs import match_classes

_MOST_NAMED = 3


def notes_of_sides(caches: Sequence[Source], samples: Sequence[np.ndarray]) -> list[str]:
    """Return lines on clips that are trained on and scored, and on classes scored that no clip is trained on.

    Clips are told by their ids: of caches of other videos with the same names this is no fault, so it refuses nothing.

    Args:
        caches: to train on and to validate on; their classes fit.
        samples: of each side.
    """
    return [*_shared_clips(caches, samples), *_untrained_classes(caches, samples)]


def _shared_clips(caches: Sequence[Source], samples: Sequence[np.ndarray]) -> list[str]:
    train, val = caches
    rows = [np.unique(cache.sample_clips[of_side]) for cache, of_side in zip(caches, samples, strict=True)]
    if train.spec.content_id == val.spec.content_id:  # no list of a million clips is read for one cache
        shared = [val.clips[row].id for row in np.intersect1d(rows[0], rows[1]).tolist()]
    else:
        trained = {train.clips[row].id for row in rows[0].tolist()}
        shared = [clip_id for row in rows[1].tolist() if (clip_id := val.clips[row].id) in trained]
    if not shared:
        return []
    told = (
        f"note: {len(shared)} of {len(rows[1])} clips to validate on are trained on too, by their names ({_named(shared)}): "
        "the accuracy of them says little of others"
    )
    return [told]


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
