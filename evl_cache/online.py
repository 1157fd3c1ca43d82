"""The control: the same training with the backbone live on the videos, and no cache.

Composes the two stages, so that what a cache changes can be measured. B samples, T frames, S the image size.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evl_cache.backbone import Backbone
from evl_cache.batches import Batch, LoaderTimes
from evl_cache.catalog import TRAIN_SPLITS, VAL_SPLITS, split_clips
from evl_cache.clips import Clip
from evl_cache.distributed import Processes
from evl_cache.epoch_order import BatchPart, EpochOrder
from evl_cache.errors import UsageError
from evl_cache.extract_dataset import ExtractRequest, Plan, plan_extraction
from evl_cache.frames import PreparedClip, prepare_clip
from evl_cache.heads import head_layers
from evl_cache.progress import TrainResult
from evl_cache.spec import CacheSpec, digest
from evl_cache.store import StoredBatch
from evl_cache.store.rows import StoredMaps, StoredTokens
from evl_cache.train import needs_maps, train_with_loaders
from evl_cache.train_options import TrainOptions
from evl_cache.trainer import OnBottleneck, OnStep

_BATCHES_AHEAD = 2  # decoded, or being decoded, while one is used


@dataclass(frozen=True, kw_only=True)
class LiveClips:
    """Videos in the place of a cache. Attributes as `FeatureCache`; `path` is the videos' root."""

    path: Path
    spec: CacheSpec
    clips: tuple[Clip, ...]
    labels: np.ndarray
    sample_clips: np.ndarray

    @classmethod
    def of(cls, plan: Plan, root: Path, spec: CacheSpec) -> "LiveClips":
        """The clips of a planned extraction, with what is to be made of them."""
        rows = np.repeat(np.arange(spec.num_clips), spec.views.per_clip)
        labels = np.asarray([clip.label for clip in plan.clips.clips], dtype=np.int64)
        return cls(path=root, spec=spec, clips=plan.clips.clips, labels=labels[rows], sample_clips=rows)

    @property
    def fingerprint(self) -> str:
        """Of no cache, but of what one would be made from."""
        return f"online-{digest([self.spec.feature_id, self.spec.content_id, list(self.spec.layers)])}"


class OnlineLoader:
    """Batches of live features, float32, in the order that a `FeatureLoader` would give.

    A clip that cannot be decoded is left out of its batch, and counted.

    Args:
        source: the clips. samples: rows. backbone: on `device`.
        batch: samples of a batch, in all processes. shuffle_seed: as `FeatureLoader`.
        forward: samples of a pass of the backbone. workers: threads that decode.
        processes: that share the batches.
    """

    def __init__(
        self,
        source: LiveClips,
        samples: np.ndarray,
        *,
        backbone: Backbone,
        device: torch.device,
        batch: int,
        shuffle_seed: int | None,
        forward: int,
        workers: int,
        processes: Processes,
    ) -> None:
        self.cache, self.samples = source, samples
        self.times = LoaderTimes()
        self.failures: dict[int, str] = {}
        self.order = EpochOrder(
            samples=samples, batch=batch, seed=shuffle_seed, rank=processes.rank, world=processes.world
        )
        self._backbone, self._device = backbone, device
        self._forward, self._workers, self._processes = forward, workers, processes

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    @property
    def skipped_clips(self) -> int:
        """Clips that could not be decoded, in all processes, so far."""
        return len(set().union(*self._processes.gather(set(self.failures), "at the end")))

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """This process's part of every batch, from a batch on; none for a batch whose clips all fail."""
        parts = self.order.parts(number, start_batch=start_batch)
        self.times = LoaderTimes()
        ahead: deque[tuple[BatchPart, Mapping[int, Future[PreparedClip]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                while len(ahead) <= _BATCHES_AHEAD and (part := next(parts, None)) is not None:
                    clips = dict.fromkeys(self.cache.sample_clips[part.rows].tolist())
                    ahead.append((part, {row: pool.submit(self._prepare, row) for row in clips}))
                if not ahead:
                    return
                batch = self._batch(*ahead.popleft())
                if batch.total:
                    yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, row: int) -> PreparedClip:
        started = time.thread_time()
        spec = self.cache.spec
        prepared = prepare_clip(self.cache.clips[row], self.cache.path, tower=spec.tower, views=spec.views)
        self.times.cpu += time.thread_time() - started
        return prepared

    def _batch(self, part: BatchPart, clips: Mapping[int, "Future[PreparedClip]"]) -> Batch:
        started = time.perf_counter()
        prepared = {row: future.result() for row, future in clips.items()}
        self.times.waited += time.perf_counter() - started
        failed = {row: clip.record.error or "" for row, clip in prepared.items() if clip.samples is None}
        self.failures |= failed
        rows = part.rows[[row not in failed for row in self.cache.sample_clips[part.rows].tolist()]]
        mine = 0 if part.is_stand_in else len(rows)
        counts = torch.tensor([float(mine)], dtype=torch.float64)
        total = int(self._processes.add(counts, "while loading").item())
        frames = [self._frames(prepared, row) for row in rows.tolist()]
        is_stand_in = mine == 0
        if not frames:
            rows, frames = part.rows[:1], [self._no_frames()]
        return Batch(
            features=self._features(frames) if total else StoredBatch(tokens=[], maps=None),
            labels=torch.from_numpy(self.cache.labels[rows]),
            samples=rows,
            number=part.number,
            total=total,
            is_stand_in=is_stand_in,
        )

    def _frames(self, prepared: Mapping[int, PreparedClip], row: int) -> torch.Tensor:
        """A sample's frames, (T, 3, S, S)."""
        samples = prepared[int(self.cache.sample_clips[row])].samples
        assert samples is not None
        return samples[row % self.cache.spec.views.per_clip]

    def _no_frames(self) -> torch.Tensor:
        size = self.cache.spec.tower.image_size
        return torch.zeros(self.cache.spec.views.frames, 3, size, size)

    def _features(self, frames: Sequence[torch.Tensor]) -> StoredBatch:
        """Tokens and maps of samples, float32 on the device."""
        found = [
            self._backbone(torch.stack(list(frames[i : i + self._forward])).to(self._device))
            for i in range(0, len(frames), self._forward)
        ]
        layers = self.cache.spec.layers
        tokens: list[StoredTokens] = [torch.cat([f.tokens[n].float() for f in found]) for n in layers]
        maps: list[StoredMaps] | None = None
        if self._backbone.with_maps and self.cache.spec.views.frames > 1:
            maps = [torch.cat([f.maps[n].float() for f in found]) for n in layers]
        return StoredBatch(tokens=tokens, maps=maps)


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
    tower, root, plans = plan_extraction(request, device=options.device)
    by_side = _sides(plans, val_names)
    blocks = request.layers or tuple(range(1, tower.spec.blocks + 1))
    layers = head_layers(options.head, blocks, options.head_layers)
    with_maps = needs_maps(options, by_side[0].spec)
    sources = [
        LiveClips.of(plan, root, replace(plan.spec, layers=layers, tokens="fp16", maps="fp16" if with_maps else "none"))
        for plan in by_side
    ]  # fmt: skip
    device, dtype = torch.device(options.device), getattr(torch, sources[0].spec.compute_dtype)
    backbone = Backbone(tower.visual.to(device=device, dtype=dtype), layers, with_maps=with_maps)
    chosen = split_clips(*sources, train_names=train_names, val_names=val_names)
    train_loader, val_loader = (
        OnlineLoader(
            source,
            _samples(source, clips),
            backbone=backbone,
            device=device,
            batch=options.global_batch,
            shuffle_seed=seed,
            forward=8 if device.type == "cpu" else 32,
            workers=workers,
            processes=processes,
        )
        for source, clips, seed in zip(sources, chosen, (options.seed, None), strict=True)
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
