"""Samples kept in memory after they were first read, so that later epochs touch no disk.

B samples of a batch, K samples kept. They stay in the stored form: a GPU holds some 20 times more of them in
8-bit codes than decoded to float32 with keys and values.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evl_cache.processes import available_bytes
from evl_cache.store import BatchBuffers, FeatureCache, Reads, StoredBatch, stored_batch

KEPT_SHARE = 0.5  # of the free memory: the rest is the training's

Arrays = Mapping[str, Sequence[np.ndarray[Any, Any]]]  # name -> one (slots, *chunk) for each layer


class ResidentSamples:
    """A fixed choice of samples, the first that fit, each of which is kept after it was read.

    Args:
        cache: what they are read from.
        samples: rows that will be asked for, in the order of preference.
        reads: what is kept of each.
        budget_bytes: most that they may take together.
        device: where they are kept.

    Attributes:
        capacity: samples that fit.
        device: as given.
    """

    def __init__(
        self,
        cache: FeatureCache,
        samples: np.ndarray,
        *,
        reads: Reads,
        budget_bytes: int,
        device: torch.device,
    ) -> None:
        one = cache.buffers(slots=1, reads=reads)
        self.device = device
        self.sample_nbytes = one.nbytes
        self.capacity = min(len(samples), budget_bytes // one.nbytes)
        self._slot_of = np.full(len(cache), -1, dtype=np.int64)
        self._slot_of[samples[: self.capacity]] = np.arange(self.capacity)
        self._is_filled = np.zeros(self.capacity, dtype=bool)
        # Memory of the computer is only taken as it is filled: an empty tensor costs nothing.
        self._tensors: Mapping[str, list[torch.Tensor]] = {
            name: [t.new_empty((self.capacity, *t.shape[1:]), device=device) for t in tensors]
            for name, tensors in one.tensors.items()
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
        for name, layers in arrays.items():
            for array, kept in zip(layers, self._tensors[name], strict=True):
                np.copyto(array[slot], kept.numpy()[mine])
        return True

    def keep(self, row: int, arrays: Arrays, slot: int) -> None:
        """Keep a row that was read into a slot of arrays, if it is one of the chosen."""
        mine = int(self._slot_of[row])
        if mine < 0:
            return
        for name, layers in arrays.items():
            for array, kept in zip(layers, self._tensors[name], strict=True):
                np.copyto(kept.numpy()[mine], array[slot])
        self._is_filled[mine] = True

    def assemble(self, rows: np.ndarray, host: BatchBuffers) -> StoredBatch:
        """Put a batch together on the device: rows that are kept, and the others from the first slots of `host`.

        The others, which are in the order of `rows`, are kept if they are of the chosen.
        """
        held = self.holds(rows)
        here, there = (torch.from_numpy(np.flatnonzero(x)).to(self.device) for x in (held, ~held))
        slots = torch.from_numpy(self._slot_of[rows[held]]).to(self.device)
        new = np.flatnonzero(self._slot_of[rows[~held]] >= 0)  # places in `host`
        new_slots = self._slot_of[rows[~held]][new]
        out: dict[str, list[torch.Tensor]] = {}
        for name, layers in host.tensors.items():
            out[name] = []
            for source, kept in zip(layers, self._tensors[name], strict=True):
                batch = kept.new_empty((len(rows), *kept.shape[1:]))
                batch[here] = kept[slots]
                # Not asynchronous: the host's memory is filled anew as soon as this returns.
                read = source[: len(there)].to(self.device)
                batch[there] = read
                kept[torch.from_numpy(new_slots).to(self.device)] = read[
                    torch.from_numpy(new).to(self.device)
                ]
                out[name].append(batch)
        self._is_filled[new_slots] = True
        held_layers = stored_batch(out)
        return held_layers if host.projected is None else host.projected.applied(held_layers)


def default_budget(device: torch.device) -> int:
    """The bytes to keep samples in by default: a share of what is available."""
    return int(KEPT_SHARE * available_bytes(device))
