"""What a forked child must not take over from its parent: locks that threads held, threads, and files that count by lock.

A child has none of its parent's threads, so that a lock which one of them held stays held; and a file that it inherits is
one with the parent's, whose locks it would share and could let go.
"""

import functools
import os
import weakref
from typing import Protocol


class Renewed(Protocol):
    """What begins anew in a child."""

    def renew(self) -> None:
        """Let go of all that is the parent's, and make new what has no state. It runs before anything else in the child."""


def renew_in_children(owner: Renewed) -> None:
    """Have `owner.renew()` called in every process that is forked from this one, as long as somebody has it."""
    _owners().add(owner)


@functools.cache
def _owners() -> "weakref.WeakSet[Renewed]":
    owners: weakref.WeakSet[Renewed] = weakref.WeakSet()

    def renew_all() -> None:
        for owner in list(owners):
            owner.renew()

    os.register_at_fork(after_in_child=renew_all)
    return owners
