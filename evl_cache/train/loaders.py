"""The loaders of a training: its samples in batches, kept in memory if that is asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evl_cache.batches import (
    DEVICE_SLOTS,
    BatchMemory,
    FeatureLoader,
    Keepers,
    ResidentSamples,
    nbytes_of,
    read_threads,
    shared_out,
)
from evl_cache.processes import Processes, available_bytes, shared_memory, sharing_groups, sharing_processors
from evl_cache.runs import match_classes, read_run_config
from evl_cache.store import FeatureCache, Reads
from evl_cache.train.memory import keeps_on_host
from evl_cache.train.options import TrainOptions

# Network and spinning disks read whole shards fastest; the thousand samples of so many blocks still mix well.
BLOCKS_AT_A_TIME = 16
# Of a GPU's free memory, for the batches of a step that is split into passes: no more, as that is done to save memory.
_SLOTS_SHARE = 0.25


def shuffle_blocks(options: TrainOptions, cache: FeatureCache, *, resumed: Path | None) -> int:
    """The number of blocks that are shuffled together; 0 for all.

    It is what the options say, else what the resumed run has, else what suits the disk: all blocks on a local one,
    `BLOCKS_AT_A_TIME` elsewhere.
    """
    if options.shuffle_blocks is not None:
        return options.shuffle_blocks
    recorded = None if resumed is None else read_run_config(resumed).training.get("shuffle_blocks")
    return (0 if cache.is_local else BLOCKS_AT_A_TIME) if recorded is None else int(recorded)


def make_loaders(
    caches: tuple[FeatureCache, FeatureCache],
    samples: Sequence[np.ndarray],
    reads: Reads,
    options: TrainOptions,
    processes: Processes,
    *,
    kept_nbytes: int,
) -> list[FeatureLoader]:
    """Return a loader of the training samples and one of the validation samples, each of this process's part.

    To be called by all processes together.

    Args:
        kept_nbytes: of samples that this process keeps, where the options say.
    """
    memory = _batch_memory(caches, reads, options, processes)
    residents = _residents(caches, samples, reads, options, processes, kept_nbytes, memory.device)
    threads = read_threads(options.read_threads, options.device, sharing=sharing_processors(processes))
    classes = [match_classes(caches[0].spec.classes, cache.spec.classes).numbers for cache in caches]
    return [
        FeatureLoader(
            cache,
            rows,
            classes=numbers,
            batch=options.global_batch,
            reads=reads,
            shuffle_seed=seed,
            shuffle_blocks=options.shuffle_blocks or 0,
            rank=processes.place.rank,
            world=processes.place.world,
            threads=threads,
            resident=resident,
            memory=memory,
        )
        for cache, rows, numbers, seed, resident in zip(
            caches, samples, classes, (options.clip_order_seed, None), residents, strict=True
        )
    ]


def _batch_memory(
    caches: Sequence[FeatureCache], reads: Reads, options: TrainOptions, processes: Processes
) -> BatchMemory:
    """Return where batches lie: on the GPU, unless a step is split into passes and would take much of its memory."""
    device = torch.device(options.device)
    if device.type == "cpu":
        return BatchMemory()
    if options.accumulate > 1 and options.keep_in != "device":
        sample = max(cache.buffers(slots=1, reads=reads).nbytes for cache in caches)
        mine = -(-options.global_batch // processes.place.world)
        if DEVICE_SLOTS * mine * sample > _SLOTS_SHARE * available_bytes(device):
            return BatchMemory(pin_memory=True)
    return BatchMemory(device)


def _residents(
    caches: Sequence[FeatureCache],
    samples: Sequence[np.ndarray],
    reads: Reads,
    options: TrainOptions,
    processes: Processes,
    budget: int,
    device: torch.device,
) -> list[ResidentSamples | None]:
    """Return what keeps the samples of each cache, or None; training samples come first, the others get the rest."""
    if options.keep_in is None:
        return [None for _ in caches]
    on_host = keeps_on_host(options)
    # A device's memory is its process's own.
    groups = sharing_groups(processes) if on_host else tuple(range(processes.place.world))
    residents: list[ResidentSamples | None] = []
    for cache, rows in zip(caches, samples, strict=True):
        served = rows[cache.is_valid[rows]]
        place = torch.device("cpu") if on_host else device
        resident, taken = _resident(cache, served, reads, processes, groups, budget=budget, device=place)
        budget -= taken
        residents.append(resident)
    return residents


def _resident(
    cache: FeatureCache,
    served: np.ndarray,
    reads: Reads,
    processes: Processes,
    groups: tuple[int, ...],
    *,
    budget: int,
    device: torch.device,
) -> tuple[ResidentSamples, int]:
    """Return what keeps samples in the memory of this process's group, and its share of the bytes.

    To be called by all processes together.

    Args:
        served: rows that can be read.
        groups: the group of each process; those of a group share their memory.
        budget: bytes, of this process.
    """
    one = cache.buffers(slots=1, reads=reads).nbytes
    each = processes.gather(min(len(served), budget // one), "while sharing out memory")
    names, sizes = np.unique(groups, return_counts=True)
    capacities = [
        min(
            len(served), size * min(count for count, group in zip(each, groups, strict=True) if group == name)
        )
        for name, size in zip(names.tolist(), sizes.tolist(), strict=True)
    ]
    mine = names.tolist().index(groups[processes.place.rank])
    memory: np.ndarray | None = None
    if max(sizes) > 1:
        memory = shared_memory(processes, groups, nbytes_of(cache, reads, capacities[mine]))
        if memory is None:
            alone = tuple(range(len(groups)))
            return _resident(cache, served, reads, processes, alone, budget=budget, device=device)
    keepers: Keepers | None = None
    if len(names) > 1:
        dealt = shared_out(served, capacities, sizes=sizes.tolist())
        of_row = np.full(len(cache), -1, dtype=np.int64)
        of_row[served] = dealt
        keepers = Keepers(of_row=of_row, group_of_rank=tuple(names.tolist().index(g) for g in groups))
        # Its own first; of the others what still fits, as parts of batches are not always its own alone.
        served = np.concatenate([served[dealt == mine], served[dealt != mine]])
    resident = ResidentSamples(
        cache,
        served,
        reads=reads,
        budget_bytes=capacities[mine] * one,
        device=device,
        memory=memory,
        keepers=keepers,
    )
    return resident, resident.nbytes // int(sizes[mine])
