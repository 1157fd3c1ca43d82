"""Stage two's other half: a trained or imported head scored on a cache."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evl_cache.batches import DEFAULT_BATCH, BatchMemory, FeatureLoader, read_threads, samples_of_clips
from evl_cache.canonical_json import digest
from evl_cache.errors import UsageError
from evl_cache.heads import Head
from evl_cache.precision import check_precision, device_named, precision_of_run
from evl_cache.runs.classes import ClassMatch, match_classes
from evl_cache.runs.comparable import Scored, clips_of_run, scored_key
from evl_cache.runs.directory import RunConfig, read_run_config
from evl_cache.runs.fit import check_features, check_reads, head_reads
from evl_cache.runs.head_files import load_head
from evl_cache.runs.intervals import Interval, wilson_interval
from evl_cache.runs.recorded import count_trained_on
from evl_cache.runs.scoring import score
from evl_cache.store import FeatureCache, Indices


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What a head scored on a cache.

    Attributes:
        top1, top5: percent of `val_clips`, views averaged.
        loss: mean over single views.
        clips_per_s: samples a second.
        precision: that the head was computed in.
        top1_interval, top5_interval: 95 % of them over the clips, in percent, by Wilson's score.
        scored_on: the run's `validation` clips, its `training` clips, or `other` ones.
        clips_trained_on: how many of the clips the run was trained on; None where that is not known.
        comparable_key: equal for runs whose figures are those of seeds of one training, scored on the same clips.
    """

    top1: float
    top5: float
    loss: float
    val_clips: int
    clips_per_s: float
    cache_fingerprint: str
    precision: str
    top1_interval: Interval
    top5_interval: Interval
    scored_on: str
    clips_trained_on: int | None
    comparable_key: str


def classes_of_run(run: str | Path, config: RunConfig, cache: FeatureCache) -> ClassMatch:
    """Match the classes of a cache with those of a run's head.

    Names that an imported head was given, or was not, leave room: its numbers may be those of a cache with names.

    Raises: UsageError naming both sides where the cache has a class that the head has not.
    """
    try:
        return match_classes(
            config.classes, cache.spec.classes, numbers_may_have_names=config.features is None
        )
    except UsageError as error:
        remedy = "; import it with the names of its classes (--classes)" if config.features is None else ""
        raise UsageError(
            f"{run}: its head has {len(config.classes)} classes, {cache.place} has {len(cache.spec.classes)}, "
            f"matched by name: {error}{remedy}"
        ) from error


def run_loader(
    run: str | Path,
    config: RunConfig,
    head: Head,
    cache: FeatureCache,
    *,
    clips: Indices | None,
    batch: int = DEFAULT_BATCH,
    device: str = "cpu",
    threads: int | None = None,
) -> FeatureLoader:
    """Read some clips of a cache (all by default) as a run's head needs them, into batches on a device.

    Raises: UsageError naming both sides where the cache's features or classes are not the head's.
    """
    match = classes_of_run(run, config, cache)
    reads = head_reads(head, check_features(config, cache.spec, run=run))
    check_reads(reads, cache)
    return FeatureLoader(
        cache,
        samples_of_clips(cache, clips),
        batch=batch,
        reads=reads,
        classes=match.numbers,
        threads=read_threads(threads, device),
        memory=BatchMemory(device),
    )


def evaluate(
    run: str | Path,
    cache: FeatureCache,
    *,
    clips: Indices | None = None,
    batch: int = DEFAULT_BATCH,
    device: str = "cpu",
    precision: str | None = None,
    threads: int | None = None,
    best: bool = False,
    on_batch: Callable[[int], None] = lambda samples: None,
    on_note: Callable[[str], None] = lambda message: None,
) -> EvalResult:
    """Score a run's head on a cache: the last one, or with `best` that of its best epoch.

    Args:
        clips: rows of the clip list, one or several, a slice, or a mask of all clips; all by default.
        precision: to compute in; that of the run's training by default, where the device has it.
        threads: that read and decode; what suits device and processors by default.
        on_note: told in a line where classes could be compared by number only.

    Raises: UsageError naming both sides where the cache's features or classes are not the head's, or for a precision
        that the device cannot compute in.
    """
    config, device = read_run_config(run), device_named(device)
    precision = precision or precision_of_run(config.training, device)
    check_precision(precision, device)
    head = load_head(run, best=best).to(device)
    loader = run_loader(run, config, head, cache, clips=clips, batch=batch, device=device, threads=threads)
    if classes_of_run(run, config, cache).by_number:
        on_note(f"{run}: classes are compared by number, as only one of its head and {cache.place} has names")
    started = time.monotonic()
    scores = score(head, loader, device=torch.device(device), precision=precision, on_batch=on_batch)
    top1, top5, clips_scored = scores.top(1), scores.top(5), len(scores.clips)
    scored: Scored = {"fingerprint": cache.fingerprint, "samples": loader.samples}
    return EvalResult(
        top1=top1,
        top5=top5,
        loss=scores.loss,
        val_clips=clips_scored,
        clips_per_s=len(loader.samples) / (time.monotonic() - started),
        cache_fingerprint=cache.fingerprint,
        precision=precision,
        top1_interval=wilson_interval(top1, clips_scored),
        top5_interval=wilson_interval(top5, clips_scored),
        scored_on=clips_of_run(config, **scored),
        clips_trained_on=count_trained_on(config, cache, scores.clips.tolist()),
        comparable_key=digest([scored_key(config, **scored), precision, best]),
    )
