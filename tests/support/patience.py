"""Patience with servers that ends by a count, for tests whose servers answer at once: a slow machine changes nothing then."""

import pytest

from evl_cache.store.objects import waits
from evl_cache.store.objects.troubles import Trouble

_ENOUGH_S = 60.0  # for an answer on a machine that stands still
_before_next = waits._Wait.before_next


def patience_of_attempts(
    patch: pytest.MonkeyPatch, attempts: int = 4, *, silence_s: float | None = None
) -> None:
    """Have the waits of this process end when more attempts than that failed, and not after a time.

    silence_s: for a server that is silent on purpose: what an attempt waits without an answer.
    """
    ended = set[waits._Wait]()

    def before_next(wait: waits._Wait, attempt: waits.Attempt, trouble: Trouble) -> None:
        if wait._failures >= attempts:
            ended.add(wait)
        _before_next(wait, attempt, trouble)

    patch.setattr(waits, "_FIRST_WAIT_S", 0.001)
    patch.setattr(waits._Wait, "before_next", before_next)
    patch.setattr(waits._Wait, "_patience_s", property(lambda wait: 0.0 if wait in ended else _ENOUGH_S))
    if silence_s is not None:
        patch.setattr(waits, "_SILENCE_S", silence_s)
