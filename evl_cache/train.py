"""Stage two: a head trained from a cache, without a video or the backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evl_cache.batch_size import resolve_batch
from evl_cache.batches import Loader
from evl_cache.checkpoint import (
    load_state,
    read_run_config,
)
from evl_cache.dataset import FeatureLoader, samples_of_clips
from evl_cache.distributed import Processes
from evl_cache.errors import UsageError
from evl_cache.heads import has_module, head_class, head_layers
from evl_cache.progress import TrainResult
from evl_cache.resident import ResidentSamples, default_budget
from evl_cache.run_setup import check_pair, prepare_run, run_config
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache, TokensRead
from evl_cache.train_options import TrainOptions
from evl_cache.trainer import OnBottleneck, OnStep, Trainer

# Blocks shuffled together on network and spinning disks: a thousand samples mix well enough for batches of 64.
BLOCKS_AT_A_TIME = 16

__all__ = ["TrainOptions", "TrainResult", "Trainer", "train", "train_with_loaders"]


def train(
    train_cache: FeatureCache,
    val_cache: FeatureCache,
    *,
    options: TrainOptions,
    out: Path,
    train_clips: Sequence[int] | None = None,
    val_clips: Sequence[int] | None = None,
    resume: bool = False,
    on_step: OnStep = lambda done, total, loss: None,
    on_bottleneck: OnBottleneck = lambda name: None,
    processes: Processes | None = None,
) -> TrainResult:
    """Train a head and leave a run directory.

    Args:
        train_clips, val_clips: rows of the clip lists; all by default.
        out: the run directory.
        resume: go on from its last state.
        on_step: called with (steps done, steps in all, loss).
        on_bottleneck: called after each step with what training waits for: `device`, `disk` or `processor`.
        processes: that train together; this one alone by default.

    Raises: UsageError where the caches do not fit each other or the head, or where `out` holds a run;
        Interrupted where a signal asked to stop, after the state was kept.
    """
    processes = processes or Processes()
    check_pair(train_cache, val_cache)
    layers = head_layers(options.head, train_cache.spec.layers, options.head_layers)
    with_maps = needs_maps(options, train_cache.spec)
    reads: dict[str, Any] = {"with_maps": with_maps, "tokens": tokens_read(options.head)}
    if with_maps and not train_cache.spec.has_maps:
        raise UsageError(
            f"{train_cache.place} holds no attention maps, which temporal cross attention reads; "
            "use --no-temporal-cross-attention, or extract with --maps"
        )
    samples = [
        samples_of_clips(cache, clips)
        for cache, clips in ((train_cache, train_clips), (val_cache, val_clips))
    ]
    served = samples[0][train_cache.is_valid[samples[0]]]
    options = resolve_batch(
        options,
        build=lambda: run_config(train_cache, {}, options, layers).build(),
        probe=lambda: train_cache.read_stored(served[:1].tolist(), layers, **reads),
        num_samples=len(served) // max(1, train_cache.spec.views.train_views),
        sample_nbytes=train_cache.buffers(slots=1, layers=layers, **reads).nbytes,
        recorded=(lambda: read_run_config(out).training.get("batch")) if resume else None,
        processes=processes,
    )
    options = replace(options, shuffle_blocks=_shuffle_blocks(options, train_cache, out if resume else None))
    train_loader, val_loader = _loaders((train_cache, val_cache), samples, layers, reads, options, processes)
    return train_with_loaders(
        train_loader,
        val_loader,
        layers=layers,
        options=options,
        out=out,
        resume=resume,
        on_step=on_step,
        on_bottleneck=on_bottleneck,
        processes=processes,
    )


def train_with_loaders(
    train_loader: Loader,
    val_loader: Loader,
    *,
    layers: tuple[int, ...],
    options: TrainOptions,
    out: Path,
    resume: bool,
    on_step: OnStep,
    on_bottleneck: OnBottleneck,
    processes: Processes,
) -> TrainResult:
    """Train on whatever batches the loaders give, of this process's part. Arguments and errors as `train`.

    layers: blocks that the loaders read. options: with the batch known.
    """
    config = run_config(train_loader.cache, {"train": train_loader, "val": val_loader}, options, layers)
    when = "while preparing the run"
    processes.on_first(lambda: prepare_run(out, config, resume=resume), when)
    trainer = Trainer(config, options, train_loader, val_loader, out=out, processes=processes)
    if resume:
        trainer.load(processes.on_first(lambda: load_state(out), when))
    return trainer.run(on_step, on_bottleneck)


def needs_maps(options: TrainOptions, spec: CacheSpec) -> bool:
    """Whether the head reads adjacent-frame maps."""
    has = has_module(options.head, "temporal_cross_attention")
    return has and options.temporal_cross_attention and spec.views.frames > 1


def tokens_read(head: str) -> TokensRead:
    """Which tokens of a frame a head reads."""
    return "class" if head_class(head).class_tokens_only else "all"


def _shuffle_blocks(options: TrainOptions, cache: FeatureCache, resumed: Path | None) -> int:
    """As asked for, as the run to go on with has it, or what suits the disk: nearly whole shards at a time far away."""
    if options.shuffle_blocks is not None:
        return options.shuffle_blocks
    recorded = None if resumed is None else read_run_config(resumed).training.get("shuffle_blocks")
    return (0 if cache.is_local else BLOCKS_AT_A_TIME) if recorded is None else int(recorded)


def _loaders(
    caches: tuple[FeatureCache, FeatureCache],
    samples: Sequence[np.ndarray],
    layers: tuple[int, ...],
    reads: Mapping[str, Any],
    options: TrainOptions,
    processes: Processes,
) -> list[FeatureLoader]:
    """Of the training and of the validation samples, of this process's part."""
    residents = _residents(caches, samples, layers, reads, options, processes)
    return [
        FeatureLoader(
            cache,
            rows,
            layers=layers,
            batch=options.global_batch,
            **reads,
            shuffle_seed=seed,
            shuffle_blocks=options.shuffle_blocks or 0,
            rank=processes.rank,
            world=processes.world,
            pin_memory=torch.device(options.device).type == "cuda",
            resident=resident,
        )
        for cache, rows, seed, resident in zip(caches, samples, (options.seed, None), residents, strict=True)
    ]


def _residents(
    caches: Sequence[FeatureCache],
    samples: Sequence[np.ndarray],
    layers: tuple[int, ...],
    reads: Mapping[str, Any],
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
            layers=layers,
            **reads,
            budget_bytes=budget,
            device=device,
        )
        budget -= resident.nbytes
        residents.append(resident)
    return residents
