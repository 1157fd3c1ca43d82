"""Batches of live features: videos decoded ahead, and the frozen backbone run on them, in the place of a cache.

B samples, T frames, S the image size.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Self

import numpy as np
import torch

from evl_cache.batches import Batch, BatchPart, EpochOrder, LoaderTimes
from evl_cache.extract import (
    Decode,
    OnOutage,
    PreparedClip,
    Surroundings,
    begin_crop_thread,
    default_batch_on,
    prepare_clip,
)
from evl_cache.live.clips import LiveClips
from evl_cache.processes import Processes
from evl_cache.store import StoredBatch, StoredMaps, StoredTokens
from evl_cache.towers import Backbone

PATIENCE_S = (
    300.0  # with an outage: half of the time after which processes that train together take one for lost
)
_BATCHES_AHEAD = 2  # decoded, or being decoded, while one is used


class OnlineLoader:
    """Batches of live features, float32, in the order that a `FeatureLoader` would give; as a context manager it ends them.

    A clip that cannot be decoded is left out of its batch, and counted. Where videos cannot be read, and no clip is to
    blame, an epoch waits, and ends with Outage where that lasts.

    Args:
        source: the clips.
        samples: rows to load.
        backbone: on `device`.
        batch: samples of a batch, in all processes.
        shuffle_seed: as `FeatureLoader`.
        decode: `frames` of a `DecodePool`, which whoever opened it closes.
        workers: processes of the pool.
        processes: the processes that share the batches.
        classes: as `FeatureLoader`.
        patience_s: how long an outage is waited for.
        on_outage: called when one begins, and when it is over.
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
        decode: Decode,
        workers: int,
        processes: Processes,
        classes: np.ndarray | None = None,
        patience_s: float = PATIENCE_S,
        on_outage: OnOutage = lambda message: None,
    ) -> None:
        self.cache, self.samples = source, samples
        self.labels = source.labels if classes is None else classes[source.labels]
        self.times = LoaderTimes()
        self.failures: dict[int, str] = {}
        self.order = EpochOrder(
            samples=samples,
            batch=batch,
            seed=shuffle_seed,
            views=1 if shuffle_seed is None else max(1, source.spec.views.train_views),
            rank=processes.place.rank,
            world=processes.place.world,
        )
        self._backbone, self._device = backbone, device
        self._forward = default_batch_on(device, source.spec)  # samples of a pass of the backbone
        self._decode, self._processes = decode, processes
        self._threads = workers + 1  # one for each process that decodes, and one that crops meanwhile
        self._running: list[ExitStack] = []  # what ends an epoch, of those that nobody has read to their end
        self._patience_s, self._on_outage = patience_s, on_outage

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    @property
    def waits_for_server(self) -> bool:
        """False: videos are files."""
        return False

    @property
    def sample_nbytes(self) -> int:
        """Zero, as nothing is stored."""
        return 0

    @property
    def skipped_clips(self) -> int:
        """Clips that could not be decoded, in all processes, so far."""
        return len(set().union(*self._processes.gather(set(self.failures), "at the end")))

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's part of every batch from `start_batch` on; a batch whose clips all fail is left out."""
        parts = self.order.parts(number, start_batch=start_batch)
        self.times = LoaderTimes()
        ahead: deque[tuple[BatchPart, Mapping[int, Future[PreparedClip]]]] = deque()
        with self._begun() as (threads, around):
            while True:
                while len(ahead) <= _BATCHES_AHEAD and (part := next(parts, None)) is not None:
                    # An epoch has one augmented view of each clip: only that one is made.
                    views = dict(
                        zip(self.cache.sample_clips[part.rows].tolist(), self._views(part.rows), strict=True)
                    )
                    ahead.append(
                        (
                            part,
                            {
                                row: threads.submit(self._prepare, row, view, around)
                                for row, view in views.items()
                            },
                        )
                    )
                if not ahead:
                    return
                batch = self._batch(*ahead.popleft())
                if batch.total:
                    yield batch

    @contextmanager
    def _begun(self) -> Iterator[tuple[ThreadPoolExecutor, Surroundings]]:
        """The threads of an epoch, and what they read through; both end with it, or with the loader."""
        threads = ThreadPoolExecutor(
            self._threads,
            thread_name_prefix="decode",
            initializer=begin_crop_thread,
            initargs=(torch.get_num_threads() > 1,),
        )
        around = Surroundings(self.cache.path, patience_s=self._patience_s, on_outage=self._on_outage)
        with ExitStack() as end:
            # Nobody waits for a thread whose decoder hangs: it ends with the pool's process, or at the clip's time limit.
            end.callback(threads.shutdown, wait=False, cancel_futures=True)
            end.callback(around.close)
            self._running.append(end)
            end.callback(self._running.remove, end)
            yield threads, around

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in list(self._running):
            end.close()

    def _views(self, samples: np.ndarray) -> list[int | None]:
        """The augmented view that each sample is; None where views are not augmented."""
        views = self.cache.spec.views
        return [sample % views.per_clip if views.train_views else None for sample in samples.tolist()]

    def _prepare(self, row: int, train_view: int | None, around: Surroundings) -> PreparedClip:
        started = time.thread_time()
        spec = self.cache.spec
        prepared = prepare_clip(
            self.cache.clips[row],
            self.cache.path,
            tower=spec.tower,
            views=spec.views,
            decode=self._decode,
            train_view=train_view,
            surroundings=around,
            may_be_missing=self.cache.clips[row].id in self.cache.known_missing,
        )
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
            labels=torch.from_numpy(self.labels[rows]),
            samples=rows,
            number=part.number,
            total=total,
            is_stand_in=is_stand_in,
        )

    def _frames(self, prepared: Mapping[int, PreparedClip], row: int) -> torch.Tensor:
        """A sample's frames, (T, 3, S, S)."""
        samples = prepared[int(self.cache.sample_clips[row])].samples
        assert samples is not None
        views = self.cache.spec.views
        return samples[0 if views.train_views else row % views.per_clip]

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
