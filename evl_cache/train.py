"""Stage two: a head trained from a cache, without a video or the backbone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from evl_cache.batch_size import resolve_batch
from evl_cache.batches import Loader, Source
from evl_cache.checkpoint import (
    HEAD_NAME,
    METRICS_NAME,
    STATE_NAME,
    STEPS_NAME,
    RunConfig,
    load_state,
    provenance_differences,
    read_run_config,
    write_run_config,
)
from evl_cache.dataset import FeatureLoader, samples_of_clips
from evl_cache.distributed import Processes
from evl_cache.errors import UsageError
from evl_cache.heads import head_layers
from evl_cache.heads.evl import MODULES
from evl_cache.progress import TrainResult
from evl_cache.resident import ResidentSamples, default_budget
from evl_cache.spec import CacheSpec, digest
from evl_cache.store import FeatureCache
from evl_cache.train_options import OPERATIONAL, TrainOptions
from evl_cache.trainer import OnBottleneck, OnStep, Trainer

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
    if with_maps and not train_cache.spec.has_maps:
        raise UsageError(
            f"{train_cache.path} holds no attention maps, which temporal cross attention reads; "
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
        probe=lambda: train_cache.read_stored(served[:1].tolist(), layers, with_maps=with_maps),
        num_samples=len(served),
        sample_nbytes=train_cache.buffers(slots=1, layers=layers, with_maps=with_maps).nbytes,
        recorded=(lambda: read_run_config(out).training.get("batch")) if resume else None,
        processes=processes,
    )
    residents = _residents((train_cache, val_cache), samples, layers, with_maps, options, processes)
    train_loader, val_loader = (
        FeatureLoader(
            cache,
            rows,
            layers=layers,
            batch=options.global_batch,
            with_maps=with_maps,
            shuffle_seed=seed,
            rank=processes.rank,
            world=processes.world,
            pin_memory=torch.device(options.device).type == "cuda",
            resident=resident,
        )
        for cache, rows, seed, resident in zip(
            (train_cache, val_cache), samples, (options.seed, None), residents, strict=True
        )
    )
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
    processes.on_first(lambda: _prepare_run(out, config, resume=resume), when)
    trainer = Trainer(config, options, train_loader, val_loader, out=out, processes=processes)
    if resume:
        trainer.load(processes.on_first(lambda: load_state(out), when))
    return trainer.run(on_step, on_bottleneck)


def needs_maps(options: TrainOptions, spec: CacheSpec) -> bool:
    """Whether the head reads adjacent-frame maps."""
    return options.temporal_cross_attention and spec.views.frames > 1


def _residents(
    caches: Sequence[FeatureCache],
    samples: Sequence[np.ndarray],
    layers: tuple[int, ...],
    with_maps: bool,
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
            with_maps=with_maps,
            budget_bytes=budget,
            device=device,
        )
        budget -= resident.nbytes
        residents.append(resident)
    return residents


def check_pair(train_cache: Source, val_cache: Source) -> None:
    """Raises: UsageError where features or classes of the two caches are not comparable."""
    differing = provenance_differences(train_cache.spec, val_cache.spec)
    if train_cache.spec.classes != val_cache.spec.classes:
        differing.append(
            f"{len(train_cache.spec.classes)} classes, not {len(val_cache.spec.classes)}, or others"
        )
    if differing:
        raise UsageError(
            f"{train_cache.path} and {val_cache.path} do not belong together: {'; '.join(differing)}"
        )


def run_config(
    cache: Source, loaders: Mapping[str, Loader], options: TrainOptions, layers: tuple[int, ...]
) -> RunConfig:
    """What a run on this cache with these options is. loaders: by side, `train` and `val`."""
    spec = cache.spec
    modules = {name: getattr(options, name) for name in MODULES}
    head_config = {
        "num_layers": len(layers),
        "width": spec.tower.width,
        "num_frames": spec.views.frames,
        "grid": list(spec.tower.grid),
        "num_classes": len(spec.classes),
        "num_heads": options.num_heads,
        "dropout": options.dropout,
        **modules,
    }
    caches = {
        name: {
            "path": str(loader.cache.path),
            "fingerprint": loader.cache.fingerprint,
            "samples": len(loader.samples),
            "samples_sha256": digest(sorted(loader.samples.tolist())),
        }
        for name, loader in loaders.items()
    }
    return RunConfig(
        head=options.head,
        head_config=head_config,
        layers=layers,
        classes=spec.classes,
        features=spec.to_json(),
        training=asdict(options),
        caches=caches,
    )


def _prepare_run(out: Path, config: RunConfig, *, resume: bool) -> None:
    if not resume:
        if (out / STATE_NAME).exists() or (out / HEAD_NAME).exists():
            raise UsageError(f"{out} holds a run already; use --resume, or another --out")
        for name in (METRICS_NAME, STEPS_NAME):
            (out / name).unlink(missing_ok=True)
        write_run_config(out, config)
        return
    before = read_run_config(out)
    mine, theirs = (json.loads(json.dumps(asdict(c))) for c in (config, before))
    for side in (mine, theirs):
        side["training"] = {k: v for k, v in side["training"].items() if k not in OPERATIONAL}
    fields = [name for name in ("head", "head_config", "layers", "training") if mine[name] != theirs[name]]
    detail = [n for n in mine["training"] if mine["training"][n] != theirs["training"].get(n)]
    sides = [
        f"{side} {what}"
        for side in ("train", "val")
        for what, key in (("cache", "fingerprint"), ("clips", "samples_sha256"))
        if mine["caches"][side][key] != theirs["caches"][side].get(key)
    ]
    if fields or sides:
        raise UsageError(
            f"{out}: --resume with other {', '.join(detail or fields or sides)}; use the run's own, or another --out"
        )
