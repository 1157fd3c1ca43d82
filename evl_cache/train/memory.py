"""How trainings and sweeps share out memory: one account of what is kept, what loaders hold, and what steps take.

Samples that are kept come first, but leave what loaders and steps need; then heads of a sweep, or the batch.

All sizes are of one process. A step has `accumulate` passes, and a loader holds the samples of whole steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evl_cache.batches import DEVICE_RING, DEVICE_SLOTS, KEPT_SHARE, RING
from evl_cache.processes import MEMORY_SHARE, ProcessPlace, available_bytes
from evl_cache.store import FeatureCache, Reads
from evl_cache.train.options import TrainOptions

# Samples of more than this share of the free memory are weighed against a step of the batch that is given: measuring one
# takes a second, and a step that needs all the rest would hardly fit without them.
WEIGHED_SHARE = 0.25
GPU_SHARE = 0.9  # of what fits: memory is fragmented differently in every step
PINNED_ROUNDING = 2  # at most: torch rounds each piece of page-locked memory up to a power of two
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that are free for one process.

    Attributes:
        host: of the computer's memory.
        device: of its GPU; None where it trains on a CPU.
    """

    host: int
    device: int | None

    @classmethod
    def of(cls, options: TrainOptions, place: ProcessPlace) -> "Room":
        """Ask how much is free. Processes of a computer share its memory; each has its own device."""
        device = torch.device(options.device)
        return cls(
            host=available_bytes(_CPU) // place.local_world,
            device=None if device.type == "cpu" else available_bytes(device),
        )

    def for_steps(self, options: TrainOptions, *, kept: int) -> float:
        """The bytes for training steps, where they are taken, beside samples that are kept."""
        free = self.host if self.device is None else self.device
        return MEMORY_SHARE * free - (kept if steps_beside_kept(options) else 0)


@dataclass(frozen=True, kw_only=True)
class StepNeeds:
    """Bytes that training steps take, where they are taken.

    Attributes:
        fixed: of a step by itself, with the head, its gradients and what the optimiser keeps.
        each: for each sample of a pass.
    """

    fixed: float
    each: float

    def of(self, samples: int) -> float:
        """The bytes of a step whose passes have so many samples."""
        return self.fixed + samples * self.each


@dataclass(frozen=True, kw_only=True)
class Loads:
    """What the loaders of a training load.

    Attributes:
        sample_nbytes: of a sample as it is stored, the larger of the two sides'.
        kinds: 2 where the two sides are stored differently, and have buffers of their own; else 1.
        all_nbytes: of all samples, of both sides.
        num_samples: of a training epoch.
        most_samples: of an epoch of either side: no batch is larger.
    """

    sample_nbytes: int
    kinds: int
    all_nbytes: int
    num_samples: int
    most_samples: int

    @classmethod
    def of(cls, caches: Sequence[FeatureCache], samples: Sequence[np.ndarray], reads: Reads) -> "Loads":
        """What the training and the validation samples of two caches are."""
        ones = [cache.buffers(slots=1, reads=reads) for cache in caches]
        counts = [np.count_nonzero(c.is_valid[rows]) for c, rows in zip(caches, samples, strict=True)]
        num_samples = int(counts[0]) // max(1, caches[0].spec.views.train_views)
        return cls(
            sample_nbytes=max(one.nbytes for one in ones),
            kinds=1 if ones[0].holds_the_same(ones[1]) else 2,
            all_nbytes=sum(int(count) * one.nbytes for count, one in zip(counts, ones, strict=True)),
            num_samples=num_samples,
            most_samples=max(num_samples, int(counts[1])),
        )

    def per_pass(self, options: TrainOptions, place: ProcessPlace) -> int:
        """Samples of a process's part of a batch that is given, for each of its passes: loaders hold all passes'."""
        return -(-min(options.global_batch, self.most_samples) // (place.world * options.accumulate))

    def in_pass(self, options: TrainOptions, place: ProcessPlace) -> int:
        """The most samples of a forward pass of a batch that is given: a small data set may fill no more than one."""
        mine = -(-min(options.global_batch, self.most_samples) // place.world)
        return min(mine, -(-options.global_batch // (place.world * options.accumulate)))

    def on_host(self, options: TrainOptions) -> int:
        """Bytes that loaders hold in the computer's memory for each sample of a pass."""
        ring = RING if torch.device(options.device).type == "cpu" else DEVICE_RING * PINNED_ROUNDING
        return ring * self.kinds * options.accumulate * self.sample_nbytes

    def beside_kept(self, options: TrainOptions) -> int:
        """Bytes that loaders hold for each sample of a pass, where the samples lie that are kept."""
        return self.on_host(options) if keeps_on_host(options) else self.on_device(options)

    def on_device(self, options: TrainOptions) -> int:
        """Bytes that loaders hold on a GPU for each sample of a pass."""
        if torch.device(options.device).type == "cpu":
            return 0
        # Where samples are kept, those that are kept and those that are not are put together in more memory.
        slots = DEVICE_SLOTS * self.kinds + (1 if options.keep_in == "device" else 0)
        return slots * options.accumulate * self.sample_nbytes


def keeps_on_host(options: TrainOptions) -> bool:
    """Whether the samples that are kept lie in the computer's memory."""
    return options.keep_in == "ram" or torch.device(options.device).type == "cpu"


def steps_beside_kept(options: TrainOptions) -> bool:
    """Whether steps are taken in the memory where samples are kept, or would be."""
    return torch.device(options.device).type == "cpu" or not keeps_on_host(options)


def may_be_recorded(options: TrainOptions, place: ProcessPlace) -> bool:
    """Whether steps are recorded if nothing goes wrong (see `step_graph`): that holds as much memory as a step takes."""
    is_plain = place.world == 1 and options.accumulate == 1
    return options.cuda_graph is not False and is_plain and torch.device(options.device).type == "cuda"


def kept_nbytes(
    options: TrainOptions,
    loads: Loads,
    room: Room,
    place: ProcessPlace,
    *,
    needed: float,
    on_note: Callable[[str], None] = lambda message: None,
) -> int:
    """The bytes of samples that this process keeps: what was told, or a share of what is free, as far as it fits.

    Args:
        needed: bytes that the training takes beside them, at least, where they lie.
        on_note: told in a line where that is less than was told.
    """
    if options.keep_in is None:
        return 0
    on_host = keeps_on_host(options)
    free, share = (room.host, MEMORY_SHARE) if on_host or room.device is None else (room.device, GPU_SHARE)
    # Processes of a computer share the samples in its memory.
    sharing = place.local_world if on_host else 1
    most = -(-loads.all_nbytes // sharing)
    told = KEPT_SHARE * free if options.keep_bytes is None else options.keep_bytes // sharing
    kept = max(0, int(min(most, told, share * free - needed)))
    asked = min(most, told)
    if kept < (asked if options.keep_bytes is not None else min(asked, loads.sample_nbytes)):
        of_told = f" of {options.keep_bytes / 1e9:.1f}" if options.keep_bytes is not None else ""
        on_note(
            f"{kept * sharing / 1e9:.1f}{of_told} GB are kept: {free / 1e9:.1f} GB are free, and steps and batches need "
            f"{needed / 1e9:.1f} GB of them; a smaller --batch leaves more"
        )
    return kept
