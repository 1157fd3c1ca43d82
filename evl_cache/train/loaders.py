"""The loaders of a training: its samples in batches, kept in memory where that is asked for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evl_cache.batches import FeatureLoader, ResidentSamples, default_budget
from evl_cache.processes import Processes
from evl_cache.runs import read_run_config
from evl_cache.store import FeatureCache
from evl_cache.train.head_reads import HeadReads
from evl_cache.train.options import TrainOptions

# Blocks shuffled together on network and spinning disks: a thousand samples mix well enough for batches of 64.
BLOCKS_AT_A_TIME = 16


def shuffle_blocks(options: TrainOptions, cache: FeatureCache, *, resumed: Path | None) -> int:
    """As asked for, as the run to go on with has it, or what suits the disk: nearly whole shards at a time far away."""
    if options.shuffle_blocks is not None:
        return options.shuffle_blocks
    recorded = None if resumed is None else read_run_config(resumed).training.get("shuffle_blocks")
    return (0 if cache.is_local else BLOCKS_AT_A_TIME) if recorded is None else int(recorded)


def make_loaders(
    caches: tuple[FeatureCache, FeatureCache],
    samples: Sequence[np.ndarray],
    reads: HeadReads,
    options: TrainOptions,
    processes: Processes,
) -> list[FeatureLoader]:
    """Of the training and of the validation samples, of this process's part."""
    residents = _residents(caches, samples, reads, options, processes)
    return [
        FeatureLoader(
            cache,
            rows,
            batch=options.global_batch,
            **reads.arguments,
            shuffle_seed=seed,
            shuffle_blocks=options.shuffle_blocks or 0,
            rank=processes.rank,
            world=processes.world,
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
    reads: HeadReads,
    options: TrainOptions,
    processes: Processes,
) -> list[ResidentSamples | None]:
    """Where samples of each cache are kept; what the training samples leave of the memory is for the others."""
    if options.keep_in is None:
        return [None for _ in caches]
    device = torch.device("cpu" if options.keep_in == "ram" else options.device)
    # Processes of a computer share its memory; each has its own device.
    sharing = processes.local_world if device.type == "cpu" else 1
    budget = (options.keep_bytes or default_budget(device)) // sharing
    residents: list[ResidentSamples | None] = []
    for cache, rows in zip(caches, samples, strict=True):
        resident = ResidentSamples(
            cache,
            rows[cache.is_valid[rows]],
            **reads.arguments,
            budget_bytes=budget,
            device=device,
        )
        budget -= resident.nbytes
        residents.append(resident)
    return residents
