"""Batches of cached features for stage two: threads fill a reused ring of buffers, straight from the shards.

B samples. No worker processes and no collate copies: features stay as they are stored and are decoded on the
device that uses them.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from evl_cache.batches.batch import Batch, LoaderTimes
from evl_cache.batches.epoch_order import BatchPart, EpochOrder
from evl_cache.batches.resident import ResidentSamples
from evl_cache.errors import UsageError
from evl_cache.store import BatchBuffers, FeatureCache, Reads, TokensRead

_RING = 3  # one with the consumer, two being filled


class FeatureLoader:
    """Batches of some samples of a cache, read ahead in threads.

    Args:
        cache: open for reading.
        samples: rows; failed ones are left out.
        reads: what is read of each.
        layers, with_maps, tokens: the same, where `reads` is not given.
        batch: samples of a batch, in all processes; the last of an epoch is smaller.
        shuffle_seed: the order of an epoch is drawn from (seed, epoch), and with it which of a clip's augmented
            training views the epoch has; None keeps the order, and has all.
        shuffle_blocks: 0 permutes all samples (local disks). Otherwise blocks are permuted, and samples are shuffled
            within so many of them at a time: shards are then read nearly in one piece (network and spinning disks).
        rank, world: this process reads its part of every batch.
        threads: how many read.
        pin_memory: page-locked buffers, for a GPU.
        resident: keeps samples, as `reads` says, after they were first read.

    Raises: UsageError where no sample is left. CacheDamaged where a mark of their blocks is not intact, or not the one
        that the manifest names: the run would leave samples out, or take others.
    """

    def __init__(
        self,
        cache: FeatureCache,
        samples: Sequence[int] | np.ndarray,
        *,
        batch: int,
        reads: Reads | None = None,
        layers: Sequence[int] = (),
        with_maps: bool = True,
        tokens: TokensRead = "all",
        shuffle_seed: int | None = None,
        shuffle_blocks: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        pin_memory: bool = False,
        resident: ResidentSamples | None = None,
    ) -> None:
        rows = np.asarray(samples, dtype=np.int64)
        cache.check_marks(rows)
        self.samples = rows[cache.is_valid[rows]]
        if not len(self.samples):
            raise UsageError(
                f"{cache.place}: none of the {len(rows)} samples asked for are extracted; run extract first"
            )
        if batch < 1 or threads < 1:
            raise UsageError(f"batch is {batch}, threads {threads}; expected at least 1 of each")
        if (reads is None) != bool(layers):
            raise UsageError(f"layers are {list(layers)}, reads {reads}; expected one of them")
        self.reads = reads or Reads(layers=tuple(layers), with_maps=with_maps, tokens=tokens)
        self.cache, self.batch = cache, batch
        self.skipped_clips = len(np.unique(cache.sample_clips[rows[~cache.is_valid[rows]]]))
        self.times = LoaderTimes()
        self.order = EpochOrder(
            samples=self.samples,
            batch=batch,
            seed=shuffle_seed,
            block_samples=cache.spec.block_samples,
            shuffle_blocks=shuffle_blocks,
            views=1 if shuffle_seed is None else max(1, cache.spec.views.train_views),
            rank=rank,
            world=world,
        )
        self._threads, self._pin_memory = threads, pin_memory
        on_host = resident is not None and resident.device.type == "cpu"
        self._in_ram: ResidentSamples | None = resident if on_host else None
        self._on_device: ResidentSamples | None = None if on_host else resident
        self._ring: list[BatchBuffers] = []

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    @property
    def sample_nbytes(self) -> int:
        """The bytes that are read of a sample, decompressed."""
        return self.cache.buffers(slots=1, reads=self.reads).nbytes

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's part of every batch, from batch `start_batch` on (to resume in mid-epoch)."""
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
        if self._on_device is None:
            features = buffers.batch(len(part.rows))
        else:
            features = self._on_device.assemble(part.rows, buffers)
        return Batch(
            features=features,
            labels=torch.from_numpy(self.cache.labels[part.rows]),
            samples=part.rows,
            number=part.number,
            total=part.total,
            is_stand_in=part.is_stand_in,
        )

    def _grown(self, ring: list[BatchBuffers], count: int) -> list[BatchBuffers]:
        most = -(-min(self.batch, self.order.samples_of_epoch) // self.order.world)
        new = [
            self.cache.buffers(slots=most, reads=self.reads, pin_memory=self._pin_memory)
            for _ in range(count - len(ring))
        ]
        return [*ring, *new]

    def _start(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, buffers: BatchBuffers
    ) -> list["Future[None]"]:
        if self._on_device is not None:
            # The others fill the first slots; `assemble` puts all in their places.
            rows = rows[~self._on_device.holds(rows)]
        pairs = list(enumerate(rows.tolist()))
        away = rows if self._in_ram is None else rows[~self._in_ram.holds(rows)]
        self.cache.prefetch(buffers, away.tolist(), self.reads.layers)
        return [
            pool.submit(self._read, pairs[thread :: self._threads], buffers)
            for thread in range(self._threads)
        ]

    def _read(self, pairs: Sequence[tuple[int, int]], buffers: BatchBuffers) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        if self._in_ram is None:
            self.cache.read_into(buffers, pairs, self.reads.layers)
        else:
            away = [(s, row) for s, row in pairs if not self._in_ram.load(row, buffers.arrays, s)]
            self.cache.read_into(buffers, away, self.reads.layers)
            for slot, row in away:
                self._in_ram.keep(row, buffers.arrays, slot)
        cpu = time.thread_time() - cpu
        self.times.cpu += cpu
        self.times.io += max(0.0, time.perf_counter() - wall - cpu)

    def _wait(self, futures: Sequence["Future[None]"]) -> None:
        started = time.perf_counter()
        for future in futures:
            future.result()
        self.times.waited += time.perf_counter() - started
