"""The control: the same training with the backbone live on the videos, and no cache.

Comparing the two tells what a cache changes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from evl_cache.batches import samples_of_clips, split_clips
from evl_cache.clips import TRAIN_SPLITS, VAL_SPLITS
from evl_cache.errors import UsageError
from evl_cache.extract import (
    ExtractionJob,
    ExtractRequest,
    OnOutage,
    OnRead,
    decoding_for,
    default_workers_on,
    plan_extraction,
)
from evl_cache.live.clips import LiveClips
from evl_cache.live.loader import OnlineLoader
from evl_cache.processes import Processes, giving_back_memory
from evl_cache.runs import OnWait, match_classes
from evl_cache.towers import Backbone
from evl_cache.train import (
    OnBottleneck,
    OnStep,
    TrainOptions,
    TrainResult,
    check_caches,
    train_with_loaders,
    training_reads,
    written_by_first,
)
from evl_cache.video import DecodeOptions
from evl_cache.video.pool import DEFAULT_TIMEOUT_S, DecodePool


@giving_back_memory
def train_online(
    request: ExtractRequest,
    *,
    options: TrainOptions,
    out: str | Path,
    train_names: Sequence[str] | None = None,
    val_names: Sequence[str] | None = None,
    resume: bool = False,
    workers: int | None = None,
    decoding: DecodeOptions | None = None,
    clip_timeout_s: float = DEFAULT_TIMEOUT_S,
    on_read: OnRead = lambda read: None,
    on_step: OnStep = lambda done, total, loss: None,
    on_bottleneck: OnBottleneck = lambda name: None,
    on_failure: Callable[[str, str], None] = lambda clip, reason: None,
    on_outage: OnOutage = lambda message: None,
    on_wait: OnWait = lambda message: None,
    processes: Processes | None = None,
    command: str | None = None,
) -> TrainResult:
    """Train a head on features made anew in every epoch, and leave a run directory as `train` does.

    Args:
        request: the videos, the tower and the views, as for an extraction; its storage is not used.
        train_names: ids or paths of clips to train on; all by default.
        val_names: ids or paths of clips to validate on; all by default.
        workers: processes that decode; by default as `extract` has it.
        decoding: how; by default with a decoder that gives the pixels of the request.
        clip_timeout_s: longest time for decoding one clip.
        on_read: called with what was read before the tower is built.
        on_failure: called at the end with each clip that could not be decoded, and why.
        on_outage: called with a line when a disk, say, is away, and with one when it is back; and as `on_note` of `train`.
        on_wait, command: as for `train`.

    Raises: as `plan_extraction` and `train`; UsageError for options that need a cache; Outage where
        the videos cannot be read, and no clip is to blame: `resume` goes on.
    """
    out, processes = Path(out), processes or Processes()
    if options.batch == "auto" or options.keep_in is not None:
        raise UsageError(
            "--online has no cache to measure or to keep; give --batch a number, no --cache-in-…"
        )
    if options.shuffle_blocks:
        raise UsageError("--online has no blocks to shuffle; leave --shuffle-blocks out")
    if options.cuda_graph:
        raise UsageError("--online makes batches of any size; leave --cuda-graph out")
    if options.read_threads is not None:
        raise UsageError(
            "--online reads videos; leave --read-threads out, --decode-workers says how many decode"
        )
    options = replace(options, shuffle_blocks=0)
    decoding = decoding_for(request.pixels, decoding or DecodeOptions(), device=options.device)
    jobs = _sides(plan_extraction(request, device=options.device, on_read=on_read), val_names)
    workers = workers or default_workers_on(options.device, jobs[0].spec, decoding).decoding
    with (
        written_by_first(out, processes, on_wait) as writer,
        DecodePool(workers, options=decoding, timeout_s=clip_timeout_s) as pool,
        ExitStack() as loaders,
    ):
        layers, backbone, sources = _live(jobs, request.layers, options)
        chosen = split_clips(*sources, train_names=train_names, val_names=val_names)
        train_loader, val_loader = (
            loaders.enter_context(
                OnlineLoader(
                    source,
                    samples_of_clips(source, clips),
                    backbone=backbone,
                    device=torch.device(options.device),
                    batch=options.global_batch,
                    shuffle_seed=seed,
                    decode=pool.frames,
                    workers=workers,
                    processes=processes,
                    classes=match_classes(sources[0].spec.classes, source.spec.classes).numbers,
                    on_outage=on_outage,
                )
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
            on_note=on_outage,
            processes=processes,
            writer=writer,
            records_steps=False,
            command=command,
        )
    for loader in (train_loader, val_loader):
        for row, reason in sorted(loader.failures.items()):
            on_failure(loader.cache.clips[row].id, reason)
    return result


def _live(
    jobs: Sequence[ExtractionJob], layers: tuple[int, ...] | None, options: TrainOptions
) -> tuple[tuple[int, ...], Backbone, list[LiveClips]]:
    """The layers that the head reads, the backbone cut after them, and the clips of each side."""
    tower = jobs[0].tower
    all_layers = tuple(range(1, tower.spec.blocks + 1))
    reads = training_reads(options, replace(jobs[0].spec, layers=layers or all_layers))
    maps = "fp16" if reads.with_maps else "none"
    dtype: torch.dtype = getattr(torch, jobs[0].spec.compute_dtype)
    visual = tower.visual.to(device=torch.device(options.device), dtype=dtype)
    sources = [
        LiveClips(
            path=job.root,
            spec=replace(job.spec, layers=reads.layers, tokens="fp16", maps=maps),
            clips=job.clips.clips,
            origin=job.origin,
            known_missing=job.known_missing,
        )
        for job in jobs
    ]
    check_caches(sources, [reads])
    return reads.layers, Backbone(visual, reads.layers, with_maps=reads.with_maps), sources


def _sides(
    jobs: Sequence[ExtractionJob], val_names: Sequence[str] | None
) -> tuple[ExtractionJob, ExtractionJob]:
    """What to train and what to validate on. Raises: UsageError where the data set does not tell."""
    train = [job for job in jobs if job.spec.split in TRAIN_SPLITS]
    val = [job for job in jobs if job.spec.split in VAL_SPLITS]
    if len(jobs) == 1 and val_names is not None:
        return jobs[0], jobs[0]
    if len(train) == 1 and val:
        return train[0], val[0]
    raise UsageError(
        f"--online: the data set has {', '.join(job.spec.split for job in jobs)}; expected train and val, or one "
        "list with --val-clips"
    )
