"""Batches of cached features for stage two: threads fill a reused ring of buffers, straight from the shards.

B samples. No worker processes and no collate copies: features stay as they are stored and are decoded on the
device that uses them.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from evl_cache.clips import Clip
from evl_cache.epoch_order import BatchPart, EpochOrder
from evl_cache.errors import UsageError
from evl_cache.resident import ResidentSamples
from evl_cache.spec import CacheSpec
from evl_cache.store import BatchBuffers, FeatureCache, StoredBatch

_RING = 3  # one with the consumer, two being filled


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Features of B samples, their labels int64 (B,) and their rows in the cache int64 (B,).

    The features' memory is reused: it holds until the next batch is asked for.
    number: of the batch in its epoch. total: its samples in all processes. is_stand_in: see `BatchPart`.
    """

    features: StoredBatch
    labels: torch.Tensor
    samples: np.ndarray
    number: int
    total: int
    is_stand_in: bool = False


@dataclass(kw_only=True)
class LoaderTimes:
    """Where the time of an epoch went, in seconds, summed over threads but for `waited`.

    Attributes:
        waited: the consumer waited for a batch. cpu: threads decoded. io: threads waited for the disk.
    """

    waited: float = 0.0
    cpu: float = 0.0
    io: float = 0.0

    def bottleneck(self, elapsed: float) -> str:
        """`device` where the consumer hardly waits; else `disk` or `processor`, whichever the threads wait for."""
        if self.waited < 0.1 * elapsed:
            return "device"
        return "disk" if self.io > self.cpu else "processor"


class Source(Protocol):
    """What samples are of: a cache, or videos that stand in for one. Attributes as `FeatureCache`."""

    spec: CacheSpec
    labels: np.ndarray
    sample_clips: np.ndarray

    @property
    def clips(self) -> Sequence[Clip]:
        """Every clip, in order."""

    @property
    def name(self) -> str:
        """For messages and `config.json`."""

    @property
    def fingerprint(self) -> str:
        """Digest of the features."""


class Loader(Protocol):
    """Batches of some samples of a source, in an order drawn anew for each epoch. See `FeatureLoader`."""

    samples: np.ndarray
    times: LoaderTimes

    @property
    def cache(self) -> Source:
        """What the samples are rows of."""

    @property
    def skipped_clips(self) -> int:
        """Clips asked for that have no features."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Every sample once, from a batch on."""


class FeatureLoader:
    """Reads batches of some samples of a cache.

    Args:
        cache: open for reading. samples: rows; failed ones are left out.
        layers: blocks. with_maps: read the maps too.
        batch: samples of a batch, in all processes; the last of an epoch is smaller.
        shuffle_seed: order of an epoch is drawn from (seed, epoch); None keeps the order.
        shuffle_blocks: how the order is drawn: 0 permutes all samples (local disks); otherwise blocks are
            permuted and samples shuffled within so many of them at a time, so that shards are read nearly in
            one piece (network and spinning disks).
        rank, world: this process reads its part of every batch.
        threads: that read. pin_memory: page-locked buffers, for a GPU.
        resident: keeps samples, of the same layers and maps, after they were first read.

    Raises: UsageError where no sample is left.
    """

    def __init__(
        self,
        cache: FeatureCache,
        samples: Sequence[int] | np.ndarray,
        *,
        layers: Sequence[int],
        batch: int,
        with_maps: bool = True,
        shuffle_seed: int | None = None,
        shuffle_blocks: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        pin_memory: bool = False,
        resident: ResidentSamples | None = None,
    ) -> None:
        rows = np.asarray(samples, dtype=np.int64)
        self.samples = rows[cache.is_valid[rows]]
        if not len(self.samples):
            raise UsageError(
                f"{cache.path}: none of the {len(rows)} samples asked for are extracted; run extract first"
            )
        if batch < 1 or threads < 1:
            raise UsageError(f"batch is {batch}, threads {threads}; expected at least 1 of each")
        self.cache, self.layers, self.batch = cache, tuple(layers), batch
        self.skipped_clips = len(np.unique(cache.sample_clips[rows[~cache.is_valid[rows]]]))
        self.times = LoaderTimes()
        self.order = EpochOrder(
            samples=self.samples,
            batch=batch,
            seed=shuffle_seed,
            block_samples=cache.spec.block_samples,
            shuffle_blocks=shuffle_blocks,
            rank=rank,
            world=world,
        )
        self._with_maps, self._threads, self._pin_memory = with_maps, threads, pin_memory
        self._resident = resident
        self._ring: list[BatchBuffers] = []

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """This process's part of every batch, from a batch on (to resume in mid-epoch)."""
        parts = self.order.parts(number, start_batch=start_batch)
        self.times = LoaderTimes()
        # Taken away while in use: a second iterator makes its own.
        ring, self._ring = self._grown(self._ring, min(_RING, max(1, len(self) - start_batch))), []
        free = deque(ring)
        filling: deque[tuple[BatchPart, BatchBuffers, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="read") as pool:
            try:
                while True:
                    while free and (part := next(parts, None)) is not None:
                        buffers = free.popleft()
                        filling.append((part, buffers, self._start(pool, part.rows, buffers)))
                    if not filling:
                        return
                    part, buffers, futures = filling.popleft()
                    self._wait(futures)
                    yield self._batch(part, buffers)
                    free.append(buffers)
            finally:
                for _, _, futures in filling:
                    for future in futures:
                        future.cancel()
                self._ring = ring

    def _batch(self, part: BatchPart, buffers: BatchBuffers) -> Batch:
        on_device = self._resident is not None and self._resident.device.type != "cpu"
        return Batch(
            features=(
                self._resident.assemble(part.rows, buffers)
                if self._resident is not None and on_device
                else buffers.batch(len(part.rows))
            ),
            labels=torch.from_numpy(self.cache.labels[part.rows]),
            samples=part.rows,
            number=part.number,
            total=part.total,
            is_stand_in=part.is_stand_in,
        )

    def _grown(self, ring: list[BatchBuffers], count: int) -> list[BatchBuffers]:
        most = -(-min(self.batch, len(self.samples)) // self.order.world)
        new = [
            self.cache.buffers(
                slots=most, layers=self.layers, with_maps=self._with_maps, pin_memory=self._pin_memory
            )
            for _ in range(count - len(ring))
        ]
        return [*ring, *new]

    def _start(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, buffers: BatchBuffers
    ) -> list["Future[None]"]:
        if self._resident is not None and self._resident.device.type != "cpu":
            rows = rows[~self._resident.holds(rows)]  # in the first slots; `assemble` puts them in their places
        pairs = list(enumerate(rows.tolist()))
        return [
            pool.submit(self._read, pairs[thread :: self._threads], buffers)
            for thread in range(self._threads)
        ]

    def _read(self, pairs: Sequence[tuple[int, int]], buffers: BatchBuffers) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        if self._resident is None or self._resident.device.type != "cpu":
            self.cache.read_into(buffers, pairs, self.layers)
        else:
            away = [(s, row) for s, row in pairs if not self._resident.load(row, buffers.arrays, s)]
            self.cache.read_into(buffers, away, self.layers)
            for slot, row in away:
                self._resident.keep(row, buffers.arrays, slot)
        cpu = time.thread_time() - cpu
        self.times.cpu += cpu
        self.times.io += max(0.0, time.perf_counter() - wall - cpu)

    def _wait(self, futures: Sequence["Future[None]"]) -> None:
        started = time.perf_counter()
        for future in futures:
            future.result()
        self.times.waited += time.perf_counter() - started


def samples_of_clips(cache: FeatureCache, clips: Sequence[int] | None) -> np.ndarray:
    """Rows of the samples of some clips (all by default), int64."""
    if clips is None:
        return np.arange(len(cache), dtype=np.int64)
    return np.flatnonzero(np.isin(cache.sample_clips, np.asarray(clips, dtype=np.int64)))
