"""What stage two trains on: a batch, and where the time to get it went.

B samples.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evl_cache.errors import EvlCacheError
from evl_cache.store import StoredBatch


class BatchOverwritten(EvlCacheError):
    """The memory of a batch that is still held was given to another one."""


class Turns:
    """How often memory was given to a batch.

    Attributes:
        number: of the batch that has it now.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0

    def begin(self) -> None:
        """Give the memory to another batch: before anything is written there."""
        self.number += 1


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A batch's hold on memory that is reused.

    Attributes:
        turns: of the memory.
        number: of the turn that is the batch's.
    """

    turns: Turns
    number: int

    @classmethod
    def of(cls, turns: Turns) -> "Hold":
        """Return the hold of the batch that has the memory now."""
        return cls(turns=turns, number=turns.number)

    def check(self) -> None:
        """Raises: BatchOverwritten where the memory was given to another batch."""
        if self.turns.number != self.number:
            raise BatchOverwritten(
                "this batch's memory holds another batch by now; use a batch before the next one is asked for, or keep "
                "batch.clone()"
            )


_FEATURES = frozenset({"tokens", "maps", "class_tokens"})


@dataclass(frozen=True, kw_only=True)
class HeldFeatures(StoredBatch):
    """Features in memory that is reused: to touch them when it holds another batch raises BatchOverwritten.

    Attributes:
        hold: on the memory.
    """

    hold: Hold

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StoredBatch:
        """Return the batch on another device; where it is there already, it is held as it was."""
        moved = super().to(device, non_blocking=non_blocking)
        return held(moved, self.hold) if moved.tensors()[0] is self.tensors()[0] else moved

    def part(self, start: int, stop: int) -> StoredBatch:
        """Return samples start .. stop-1, held as the batch is."""
        return held(super().part(start, stop), self.hold)

    if not TYPE_CHECKING:  # for which any attribute would then be there

        def __getattribute__(self, name: str) -> Any:
            """Return an attribute. Raises: BatchOverwritten."""
            if name in _FEATURES:
                object.__getattribute__(self, "hold").check()
            return object.__getattribute__(self, name)


def held(features: StoredBatch, hold: Hold) -> StoredBatch:
    """Return features that lie in memory which is reused; nothing is copied."""
    return HeldFeatures(
        tokens=features.tokens, maps=features.maps, class_tokens=features.class_tokens, hold=hold
    )


def without_hold(features: StoredBatch) -> StoredBatch:
    """Return features as whatever lies in their memory, for who wants the memory itself."""
    return StoredBatch(tokens=features.tokens, maps=features.maps, class_tokens=features.class_tokens)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples.

    To touch features, or labels on a device, when their memory holds another batch raises BatchOverwritten.

    Attributes:
        features: in memory that is reused: they hold until the next batch is asked for, if they are not cloned.
        labels: int64 (B,), where the features are.
        samples: rows in the cache, int64 (B,).
        number: of the batch in its epoch.
        total: its samples in all processes.
        is_stand_in: see `BatchPart`.
        slot: the number of the device's buffers that features and labels lie in, at the same addresses whenever it comes
            again; None where they are not in such.
        hold: on the memory that features and labels lie in; None where that is the batch's own.
    """

    features: StoredBatch = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    samples: np.ndarray
    number: int
    total: int
    is_stand_in: bool = False
    slot: int | None = None
    hold: Hold | None = field(default=None, repr=False)

    if not TYPE_CHECKING:  # for which any attribute would then be there

        def __getattribute__(self, name: str) -> Any:
            """Return an attribute. Raises: BatchOverwritten."""
            value = object.__getattribute__(self, name)
            # Labels that are in no slot are the batch's own.
            if name == "features" or (name == "labels" and self.slot is not None):
                hold = object.__getattribute__(self, "hold")
                if hold is not None:
                    hold.check()
            return value

    def clone(self) -> "Batch":
        """Return the batch in memory of its own, where it stays as it is. Raises: BatchOverwritten."""
        labels = self.labels.clone()
        return replace(
            self, features=self.features.repeated(len(labels)), labels=labels, slot=None, hold=None
        )


@dataclass(kw_only=True)
class LoaderTimes:
    """Where the time of an epoch went, in seconds.

    Attributes:
        waited: that the consumer waited for batches.
        cpu: that threads decoded, summed over them.
        io: that threads waited for the disk, summed over them.
    """

    waited: float = 0.0
    cpu: float = 0.0
    io: float = 0.0

    def bottleneck(self, elapsed: float) -> str:
        """Return `device` if the consumer hardly waits, else `disk` or `processor`, which the threads wait for more."""
        if self.waited < 0.1 * elapsed:
            return "device"
        return "disk" if self.io > self.cpu else "processor"
