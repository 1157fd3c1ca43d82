"""The memory that batches are read into and, on a device, copied into: taken once, used again and again.

B samples of a batch, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from evl_cache.batches.batch import Turns
from evl_cache.batches.streams import CudaStreams, Mark, Streams, numbered
from evl_cache.store import BatchBuffers, FeatureCache, Reads

RING = 3  # batches in the computer's memory: one in use, two being filled
DEVICE_RING = 4  # the same where batches are copied to a device: one more waits there for its copy
DEVICE_SLOTS = 2  # batches on a device: one in use, one being copied
_INDEX_ROWS = 3  # see `ResidentSamples.assemble`


@dataclass(frozen=True, kw_only=True, eq=False)
class HostSlot:
    """One batch of the ring that threads read into.

    Attributes:
        buffers: for features.
        labels: int64 (B,).
        index: int64 (3 B,), which samples of the batch are where, for samples kept on a device.
        turns: of the batches that were read into it.
    """

    buffers: BatchBuffers
    labels: torch.Tensor
    index: torch.Tensor
    turns: Turns = field(default_factory=Turns)


@dataclass(kw_only=True, eq=False)
class DeviceSlot:
    """One batch on a device.

    Attributes:
        number: of the slot; no other ever has it.
        buffers: for features.
        labels: int64 (B,).
        used: the mark behind the last computation with what it holds.
        turns: of the batches that were copied into it.
    """

    number: int
    buffers: BatchBuffers
    labels: torch.Tensor
    used: Mark
    turns: Turns = field(default_factory=Turns)


class _HasBuffers(Protocol):
    @property
    def buffers(self) -> BatchBuffers: ...


SlotT = TypeVar("SlotT", bound=_HasBuffers)


class BatchMemory:
    """Buffers that loaders take while an epoch lasts and give back: those of one training take turns in the same ones.

    Args:
        device: where batches are used. On a CPU that is where they were read; on a GPU the batch after the one in use
            is copied there from page-locked memory, while the GPU computes.
        pin_memory: page-locked memory in any case.
        streams: of the device; for tests, also on a CPU.

    Attributes:
        device: with its number.
        streams: of the device; None where batches are used where they were read.
        ring: slots that an epoch takes of the computer's memory.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        pin_memory: bool = False,
        streams: Streams | None = None,
    ) -> None:
        self.device = numbered(device)
        on_gpu = self.device.type == "cuda"
        self.streams: Streams | None = CudaStreams(self.device) if streams is None and on_gpu else streams
        self._pin_memory = pin_memory or on_gpu
        self.ring = RING if self.streams is None else DEVICE_RING
        self._host: list[HostSlot] = []
        self._device: list[DeviceSlot] = []
        self._device_slots_made = 0

    def take_host(self, cache: FeatureCache, reads: Reads, *, slots: int, count: int) -> list[HostSlot]:
        """Return `count` slots of the ring with room for `slots` samples each; new ones where others have them."""

        def make() -> HostSlot:
            pin = self._pin_memory
            return HostSlot(
                buffers=cache.buffers(slots=slots, reads=reads, pin_memory=pin),
                labels=torch.empty(slots, dtype=torch.int64, pin_memory=pin),
                index=torch.empty(_INDEX_ROWS * slots, dtype=torch.int64, pin_memory=pin),
            )

        return _taken(self._host, cache.buffers(slots=1, reads=reads), slots, count, make)

    def take_device(self, cache: FeatureCache, reads: Reads, *, slots: int, count: int) -> list[DeviceSlot]:
        """Return `count` slots on the device. Other arguments as `take_host`."""
        streams = self.streams
        assert streams is not None, "a CPU uses batches where they were read"

        def make() -> DeviceSlot:
            self._device_slots_made += 1
            return DeviceSlot(
                number=self._device_slots_made - 1,
                buffers=cache.buffers(slots=slots, reads=reads, device=self.device),
                labels=torch.empty(slots, dtype=torch.int64, device=self.device),
                # The memory may have been another tensor's, which the device still computes with.
                used=streams.mark_use(),
            )

        return _taken(self._device, cache.buffers(slots=1, reads=reads), slots, count, make)

    def give_back(self, host: list[HostSlot], device: list[DeviceSlot]) -> None:
        """Take back slots that nobody reads, copies or uses any more, but for what `used` of a slot waits for."""
        self._host += host
        self._device += device


def _taken(
    free: list[SlotT], like: BatchBuffers, slots: int, count: int, make: Callable[[], SlotT]
) -> list[SlotT]:
    """Take `count` slots out of `free` that hold what `like` does; those that are too small are let go."""
    alike = [slot for slot in free if slot.buffers.holds_the_same(like)]
    taken = [slot for slot in alike if slot.buffers.slots >= slots][:count]
    too_small = [] if len(taken) == count else [slot for slot in alike if slot.buffers.slots < slots]
    free[:] = [slot for slot in free if slot not in taken and slot not in too_small]
    del alike, too_small  # their memory is free before more is taken
    return taken + [make() for _ in range(count - len(taken))]
