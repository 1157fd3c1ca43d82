"""An epoch being read: threads fill the free slots of a ring with one batch after another."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from evl_cache.batches.batch import LoaderTimes
from evl_cache.batches.batch_memory import HostSlot
from evl_cache.batches.epoch_order import BatchPart


@dataclass(frozen=True, kw_only=True)
class PartInRing:
    """This process's part of a batch, in a slot of the ring.

    Attributes:
        part: which samples it has.
        slot: where those are that are not kept on the device, in the first places.
        is_kept: bool, which samples are kept on the device; None where none ever are.
    """

    part: BatchPart
    slot: HostSlot
    is_kept: np.ndarray | None


Start = Callable[[BatchPart, HostSlot], tuple[PartInRing, Sequence["Future[None]"]]]


class Ring:
    """Slots that are free, and parts that are being filled in, in their order.

    Args:
        parts: of the epoch.
        slots: all free.
        start: begins to read a part into a slot.
        times: where waiting is noted.
    """

    def __init__(
        self, parts: Iterator[BatchPart], slots: Sequence[HostSlot], start: Start, times: LoaderTimes
    ) -> None:
        self._parts, self._free, self._start, self._times = parts, deque(slots), start, times
        self._filling: deque[tuple[PartInRing, Sequence[Future[None]]]] = deque()
        self._fill()

    @property
    def is_filling(self) -> bool:
        """Whether a part is being read, or was."""
        return bool(self._filling)

    @property
    def has_next(self) -> bool:
        """Whether the next part is there, whole, without a wait."""
        return bool(self._filling) and all(f.done() and f.exception() is None for f in self._filling[0][1])

    def next(self) -> PartInRing | None:
        """Return the next part, when it is there; None where none is being read. Raises: what reading it raised."""
        if not self._filling:
            return None
        part, futures = self._filling.popleft()
        started = time.perf_counter()
        for future in futures:
            future.result()
        self._times.waited += time.perf_counter() - started
        return part

    def free(self, slot: HostSlot) -> None:
        """Have a slot filled anew: nobody reads it any more."""
        self._free.append(slot)
        self._fill()

    def _fill(self) -> None:
        while self._free and (part := next(self._parts, None)) is not None:
            slot = self._free.popleft()
            slot.turns.begin()
            self._filling.append(self._start(part, slot))
