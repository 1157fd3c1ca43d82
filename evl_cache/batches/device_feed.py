"""Batches on a device: the one after the batch in use is copied there while the device computes.

Nothing here waits for the device, unless every slot of the ring is being copied. What orders copies and computations are
marks in two streams:

- The device waits for a batch's copy before it computes with it.
- A copy waits until the device has passed the last computation with what its slot held.
- A slot of the ring is filled anew when the copy out of it is done.

The slots on the device are few and stay where they are: a recorded computation (a CUDA graph) may name their addresses.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from evl_cache.batches.batch import Batch
from evl_cache.batches.batch_memory import DeviceSlot, HostSlot
from evl_cache.batches.ring import PartInRing, Ring
from evl_cache.batches.streams import Mark, Streams

# What is to be copied of a part into a device's slot; called at once, and its result in the stream of copies.
Copies = Callable[[PartInRing, DeviceSlot], Callable[[], None]]


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A batch that is on its way. `copied`: the mark behind its copy."""

    part: PartInRing
    slot: DeviceSlot
    copied: Mark


class DeviceFeed:
    """The way of an epoch's batches from the ring to the device.

    Args:
        ring: the epoch as it is read.
        slots: on the device, all free.
        streams: of the device.
        copies: gives the work that moves a part.
    """

    def __init__(self, ring: Ring, slots: Sequence[DeviceSlot], streams: Streams, copies: Copies) -> None:
        self._ring, self._streams, self._copies = ring, streams, copies
        self._free = deque(slots)
        self._sent: deque[_Sent] = deque()
        self._copying: deque[tuple[Mark, HostSlot]] = deque()

    def batches(self, batch_of: Callable[[PartInRing, DeviceSlot], Batch]) -> Iterator[Batch]:
        """Yield every part of the ring as a batch on the device, which holds until the next one is asked for."""
        try:
            while (sent := self._next()) is not None:
                self._streams.use_after(sent.copied)
                try:
                    if self._free and self._ring.has_next:
                        self._send_next()
                    yield batch_of(sent.part, sent.slot)
                finally:
                    # Whatever was computed with the batch was given to the device by now.
                    sent.slot.used = self._streams.mark_use()
                    self._free.append(sent.slot)
        finally:
            for copied, _ in self._copying:
                copied.synchronize()

    def _next(self) -> _Sent | None:
        """Return the batch that is on its way, or the next one that is read; None at the end."""
        while self._copying and (self._copying[0][0].query() or not (self._sent or self._ring.is_filling)):
            copied, slot = self._copying.popleft()
            copied.synchronize()
            self._ring.free(slot)
        if not self._sent:
            self._send_next()
        return self._sent.popleft() if self._sent else None

    def _send_next(self) -> None:
        part = self._ring.next()
        if part is None:
            return
        slot = self._free.popleft()
        slot.turns.begin()
        self._streams.copy_after(slot.used)
        copied = self._streams.copy(self._copies(part, slot))
        self._copying.append((copied, part.slot))
        self._sent.append(_Sent(part=part, slot=slot, copied=copied))
