"""The control: the same training with the backbone live on the videos, and no cache.

Composes the two stages, so that what a cache changes can be measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evl_cache.batches import split_clips
from evl_cache.clips import TRAIN_SPLITS, VAL_SPLITS
from evl_cache.errors import UsageError
from evl_cache.extract import ExtractRequest, Plan, plan_extraction
from evl_cache.heads import head_layers
from evl_cache.live.clips import LiveClips
from evl_cache.live.loader import OnlineLoader
from evl_cache.processes import Processes
from evl_cache.towers import Backbone, Tower
from evl_cache.train import OnBottleneck, OnStep, TrainOptions, TrainResult, needs_maps, train_with_loaders


def train_online(
    request: ExtractRequest,
    *,
    options: TrainOptions,
    out: Path,
    train_names: Sequence[str] | None = None,
    val_names: Sequence[str] | None = None,
    resume: bool = False,
    workers: int = 2,
    on_step: OnStep = lambda done, total, loss: None,
    on_bottleneck: OnBottleneck = lambda name: None,
    on_failure: Callable[[str, str], None] = lambda clip, reason: None,
    processes: Processes | None = None,
) -> TrainResult:
    """Train a head on features made anew in every epoch, and leave a run directory as `train` does.

    Args:
        request: the videos, the tower and the views, as for an extraction; its storage is not used.
        train_names, val_names: ids or paths of clips; all by default.
        workers: threads that decode. on_failure: called at the end with clips that could not be decoded, and why.

    Raises: as `plan_extraction` and `train`; UsageError for options that need a cache.
    """
    processes = processes or Processes()
    if options.batch == "auto" or options.keep_in is not None:
        raise UsageError(
            "--online has no cache to measure or to keep; give --batch a number, no --cache-in-…"
        )
    if options.shuffle_blocks:
        raise UsageError("--online has no blocks to shuffle; leave --shuffle-blocks out")
    options = replace(options, shuffle_blocks=0)
    tower, root, plans = plan_extraction(request, device=options.device)
    layers, backbone, sources = _live(tower, root, _sides(plans, val_names), request, options)
    chosen = split_clips(*sources, train_names=train_names, val_names=val_names)
    train_loader, val_loader = (
        OnlineLoader(
            source,
            _samples(source, clips),
            backbone=backbone,
            device=torch.device(options.device),
            batch=options.global_batch,
            shuffle_seed=seed,
            workers=workers,
            processes=processes,
        )
        for source, clips, seed in zip(sources, chosen, (options.clip_order_seed, None), strict=True)
    )
    result = train_with_loaders(
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
    for loader in (train_loader, val_loader):
        for row, reason in sorted(loader.failures.items()):
            on_failure(loader.cache.clips[row].id, reason)
    return result


def _live(
    tower: Tower, root: Path, plans: Sequence[Plan], request: ExtractRequest, options: TrainOptions
) -> tuple[tuple[int, ...], Backbone, list[LiveClips]]:
    """Blocks that the head reads, the backbone cut after them, and the clips of each side."""
    blocks = request.layers or tuple(range(1, tower.spec.blocks + 1))
    layers = head_layers(options.head, blocks, options.head_layers)
    with_maps = needs_maps(options, plans[0].spec)
    maps = "fp16" if with_maps else "none"
    specs = [replace(plan.spec, layers=layers, tokens="fp16", maps=maps) for plan in plans]
    dtype: torch.dtype = getattr(torch, specs[0].compute_dtype)
    visual = tower.visual.to(device=torch.device(options.device), dtype=dtype)
    origin = request.origin(root)
    sources = [
        LiveClips.of(plan.clips, root, spec, origin=origin) for plan, spec in zip(plans, specs, strict=True)
    ]
    return layers, Backbone(visual, layers, with_maps=with_maps), sources


def _samples(source: LiveClips, clips: Sequence[int] | None) -> np.ndarray:
    if clips is None:
        return np.arange(source.spec.num_samples, dtype=np.int64)
    return np.flatnonzero(np.isin(source.sample_clips, np.asarray(clips, dtype=np.int64)))


def _sides(plans: Sequence[Plan], val_names: Sequence[str] | None) -> tuple[Plan, Plan]:
    """What to train and what to validate on. Raises: UsageError where the data set does not tell."""
    train = [plan for plan in plans if plan.split in TRAIN_SPLITS]
    val = [plan for plan in plans if plan.split in VAL_SPLITS]
    if len(plans) == 1 and val_names is not None:
        return plans[0], plans[0]
    if len(train) == 1 and val:
        return train[0], val[0]
    raise UsageError(
        f"--online: the data set has {', '.join(plan.split for plan in plans)}; expected train and val, or one "
        "list with --val-clips"
    )
