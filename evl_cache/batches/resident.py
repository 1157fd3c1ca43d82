"""Samples kept in memory after they were first read, so that later epochs touch no disk.

B samples of a batch, K samples kept, L layers. They stay in the stored form: a GPU holds some 20 times more of them in
8-bit codes than decoded to float32 with keys and values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from evl_cache.batches.batch_memory import HostSlot
from evl_cache.batches.epoch_order import Keepers
from evl_cache.batches.streams import numbered
from evl_cache.processes import available_bytes
from evl_cache.store import BatchBuffers, FeatureCache, Reads

KEPT_SHARE = 0.5  # of the free memory: the rest is the training's
_ALIGNMENT = 64  # bytes

Arrays = Mapping[str, np.ndarray[Any, Any]]  # name -> (L, slots, *chunk)


class ResidentSamples:
    """A fixed choice of samples, the first that fit, each of which is kept after it was read.

    Args:
        cache: what they are read from.
        samples: rows that will be asked for, in the order of preference.
        reads: what is kept of each.
        budget_bytes: most that they may take together.
        device: where they are kept.
        memory: zeros, uint8, `nbytes_of` them or more, to keep them in: other processes may share it, which then read
            what this one kept. Memory of this process's own by default.
        keepers: which processes keep which samples, where that differs between them.

    Attributes:
        capacity: samples that fit.
        device, keepers: as given.
    """

    def __init__(
        self,
        cache: FeatureCache,
        samples: np.ndarray,
        *,
        reads: Reads,
        budget_bytes: int,
        device: torch.device,
        memory: np.ndarray | None = None,
        keepers: Keepers | None = None,
    ) -> None:
        one = cache.buffers(slots=1, reads=reads)
        self.device, self.keepers = numbered(device), keepers
        self.sample_nbytes = one.nbytes
        self.capacity = min(len(samples), budget_bytes // one.nbytes)
        self._slot_of = np.full(len(cache), -1, dtype=np.int64)
        self._slot_of[samples[: self.capacity]] = np.arange(self.capacity)
        if memory is not None:
            self._is_filled, self._kept = _views(memory, one, self.capacity)
            return
        self._is_filled = np.zeros(self.capacity, dtype=bool)
        # Memory of the computer is only taken as it is filled: an empty tensor costs nothing.
        self._kept = {
            name: t.new_empty((len(t), self.capacity, *t.shape[2:]), device=device)
            for name, t in one.whole.items()
        }

    @property
    def nbytes(self) -> int:
        """The bytes that are taken when all are kept."""
        return self.capacity * self.sample_nbytes

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """Whether each row is kept already, bool."""
        slots = self._slot_of[rows]
        held: np.ndarray = slots >= 0
        held[held] = self._is_filled[slots[held]]
        return held

    def load(self, row: int, arrays: Arrays, slot: int) -> bool:
        """Copy a row that is kept in the computer's memory into a slot of arrays. Returns: whether it is kept."""
        mine = int(self._slot_of[row])
        if mine < 0 or not self._is_filled[mine]:
            return False
        for name, array in arrays.items():
            for out, kept in zip(array, self._kept[name].numpy(), strict=True):
                np.copyto(out[slot], kept[mine])
        return True

    def keep(self, row: int, arrays: Arrays, slot: int) -> None:
        """Keep a row that was read into a slot of arrays, if it is one of the chosen."""
        mine = int(self._slot_of[row])
        if mine < 0:
            return
        for name, array in arrays.items():
            for kept, read in zip(self._kept[name].numpy(), array, strict=True):
                np.copyto(kept[mine], read[slot])
        self._is_filled[mine] = True

    def assemble(
        self, rows: np.ndarray, is_kept: np.ndarray, host: HostSlot, out: BatchBuffers
    ) -> Callable[[], None]:
        """Return the work that puts a batch together on the device, to be done in order with that of other batches.

        Rows that are kept are gathered; the others, in the order of `rows`, come from the first places of `host`, and
        are kept if they are of the chosen.

        Args:
            is_kept: what `holds` said of the rows, before the others were read.
            host: its memory must not change before the work is done.
            out: buffers on the device.
        """
        here, there = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
        new = np.flatnonzero(self._slot_of[rows[there]] >= 0)  # places in `host`
        new_slots = self._slot_of[rows[there]][new]
        pieces = (here, self._slot_of[rows[here]], there, new, new_slots)
        sizes = [len(piece) for piece in pieces]
        packed = host.index[: sum(sizes)]
        packed.copy_(torch.from_numpy(np.concatenate(pieces)))
        # All that asks for them later is done after this work, on a device.
        self._is_filled[new_slots] = True

        def work() -> None:
            indices = torch.split(packed.to(self.device, non_blocking=True), sizes)
            for name, kept in self._kept.items():
                _assemble(kept, host.buffers.tensors[name], out.whole[name][:, : len(rows)], *indices)

        return work


def _assemble(
    kept: torch.Tensor,
    read: list[torch.Tensor],
    out: torch.Tensor,
    here: torch.Tensor,
    slots: torch.Tensor,
    there: torch.Tensor,
    new: torch.Tensor,
    new_slots: torch.Tensor,
) -> None:
    """Fill `out` (L, B, *chunk): places `here` from `slots` of `kept`, places `there` from what was read.

    Of what was read, `new` goes to `new_slots` of `kept`.
    """
    if len(there) == 0:
        out.copy_(kept.index_select(1, slots))
        return
    all_are_read = len(here) == 0
    moved = out if all_are_read else kept.new_empty((len(kept), len(there), *kept.shape[2:]))
    for target, source in zip(
        moved, read, strict=True
    ):  # layer by layer: from page-locked memory in one piece
        target.copy_(source[: len(there)], non_blocking=True)
    if not all_are_read:
        out.index_copy_(1, here, kept.index_select(1, slots))
        out.index_copy_(1, there, moved)
    if len(new):
        all_are_new = len(new) == len(there)
        kept.index_copy_(1, new_slots, moved if all_are_new else moved.index_select(1, new))


def nbytes_of(cache: FeatureCache, reads: Reads, capacity: int) -> int:
    """The bytes of memory that holds so many samples, for processes to share."""
    one = cache.buffers(slots=1, reads=reads)
    return _aligned(capacity) + sum(_aligned(capacity * t.nbytes) for t in one.whole.values())


def _views(
    memory: np.ndarray, one: BatchBuffers, capacity: int
) -> tuple[np.ndarray, Mapping[str, torch.Tensor]]:
    """Return which samples memory holds, bool (K,), and the tensors (L, K, *chunk) in it by name."""
    kept, start = {}, _aligned(capacity)
    for name, t in one.whole.items():
        shape = (len(t), capacity, *t.shape[2:])
        nbytes = math.prod(shape) * t.element_size()
        kept[name] = torch.from_numpy(memory[start : start + nbytes]).view(t.dtype).reshape(shape)
        start += _aligned(nbytes)
    return memory[:capacity].view(bool), kept


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def default_budget(device: torch.device) -> int:
    """The bytes to keep samples in by default: a share of what is available."""
    return int(KEPT_SHARE * available_bytes(device))
