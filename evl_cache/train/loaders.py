"""The loaders of a training: its samples in batches, kept in memory if that is asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evl_cache.batches import FeatureLoader, ResidentSamples, default_budget
from evl_cache.processes import Processes
from evl_cache.runs import read_run_config
from evl_cache.store import FeatureCache, Reads
from evl_cache.train.options import TrainOptions

# Network and spinning disks read whole shards fastest; the thousand samples of so many blocks still mix well.
BLOCKS_AT_A_TIME = 16


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
) -> list[FeatureLoader]:
    """Return a loader of the training samples and one of the validation samples, each of this process's part."""
    residents = _residents(caches, samples, reads, options, processes)
    return [
        FeatureLoader(
            cache,
            rows,
            batch=options.global_batch,
            reads=reads,
            shuffle_seed=seed,
            shuffle_blocks=options.shuffle_blocks or 0,
            rank=processes.place.rank,
            world=processes.place.world,
            pin_memory=torch.device(options.device).type == "cuda",
            resident=resident,
        )
        for cache, rows, seed, resident in zip(
            caches, samples, (options.clip_order_seed, None), residents, strict=True
        )
    ]


def _residents(
    caches: Sequence[FeatureCache],
    samples: Sequence[np.ndarray],
    reads: Reads,
    options: TrainOptions,
    processes: Processes,
) -> list[ResidentSamples | None]:
    """Return what keeps the samples of each cache, or None; training samples come first, the others get the rest."""
    if options.keep_in is None:
        return [None for _ in caches]
    device = torch.device("cpu" if options.keep_in == "ram" else options.device)
    # Processes of a computer share its memory; each has its own device.
    sharing = processes.place.local_world if device.type == "cpu" else 1
    budget = (options.keep_bytes or default_budget(device)) // sharing
    residents: list[ResidentSamples | None] = []
    for cache, rows in zip(caches, samples, strict=True):
        resident = ResidentSamples(
            cache, rows[cache.is_valid[rows]], reads=reads, budget_bytes=budget, device=device
        )
        budget -= resident.nbytes
        residents.append(resident)
    return residents
