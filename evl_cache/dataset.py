"""Batches of cached features for stage two: threads fill a reused ring of buffers, straight from the shards.

B samples. No worker processes and no collate copies: features stay as they are stored and are decoded on the
device that uses them.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from evl_cache.errors import UsageError
from evl_cache.store import BatchBuffers, FeatureCache, StoredBatch

_RING = 3  # one with the consumer, two being filled


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Features of B samples, their labels int64 (B,) and their rows in the cache int64 (B,).

    The features' memory is reused: it holds until the next batch is asked for.
    """

    features: StoredBatch
    labels: torch.Tensor
    samples: np.ndarray


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


class FeatureLoader:
    """Reads batches of some samples of a cache.

    Args:
        cache: open for reading. samples: rows; failed ones are left out.
        layers: blocks. with_maps: read the maps too.
        batch: samples of a batch; the last of an epoch is smaller.
        shuffle_seed: order of an epoch is drawn from (seed, epoch); None keeps the order.
        shuffle_blocks: how the order is drawn: 0 permutes all samples (local disks); otherwise blocks are
            permuted and samples shuffled within so many of them at a time, so that shards are read nearly in
            one piece (network and spinning disks).
        rank, world: this process reads every world-th batch's worth of samples.
        threads: that read. pin_memory: page-locked buffers, for a GPU.

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
    ) -> None:
        rows = np.asarray(samples, dtype=np.int64)
        self.samples = rows[cache.is_valid[rows]]
        if len(self.samples) < world:
            raise UsageError(
                f"{cache.path}: {len(self.samples) or 'none'} of the {len(rows)} samples asked for are extracted; "
                f"expected at least {world}: run extract first"
            )
        if batch < 1 or threads < 1:
            raise UsageError(f"batch is {batch}, threads {threads}; expected at least 1 of each")
        self.cache, self.layers, self.batch = cache, tuple(layers), batch
        self.times = LoaderTimes()
        self._with_maps, self._seed, self._shuffle_blocks = with_maps, shuffle_seed, shuffle_blocks
        self._rank, self._world, self._threads, self._pin_memory = rank, world, threads, pin_memory
        self._ring: list[BatchBuffers] = []

    def __len__(self) -> int:
        """Batches of an epoch, of this rank."""
        return -(-len(self._of_rank(self.samples)) // self.batch)

    def order(self, epoch: int) -> np.ndarray:
        """This rank's samples in the order of an epoch, int64. The same epoch gives the same order."""
        order = self.samples
        if self._seed is not None:
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(order) if self._shuffle_blocks == 0 else self._by_blocks(rng)
        return self._of_rank(order)

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Every sample once, from a batch on (to resume in mid-epoch)."""
        order = self.order(number)
        starts = range(start_batch * self.batch, len(order), self.batch)
        parts = iter([order[start : start + self.batch] for start in starts])
        self.times = LoaderTimes()
        # Taken away while in use: a second iterator makes its own.
        ring, self._ring = self._grown(self._ring, min(_RING, max(1, len(starts)))), []
        free = deque(ring)
        filling: deque[tuple[np.ndarray, BatchBuffers, list[Future[None]]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="read") as pool:
            try:
                while True:
                    while free and (part := next(parts, None)) is not None:
                        buffers = free.popleft()
                        filling.append((part, buffers, self._start(pool, part, buffers)))
                    if not filling:
                        return
                    rows, buffers, futures = filling.popleft()
                    self._wait(futures)
                    labels = torch.from_numpy(self.cache.labels[rows])
                    yield Batch(features=buffers.batch(len(rows)), labels=labels, samples=rows)
                    free.append(buffers)
            finally:
                for _, _, futures in filling:
                    for future in futures:
                        future.cancel()
                self._ring = ring

    def _of_rank(self, order: np.ndarray) -> np.ndarray:
        # Equal shares: ranks must take the same number of steps. What does not divide is left out of this epoch.
        return order[self._rank : len(order) // self._world * self._world : self._world]

    def _by_blocks(self, rng: np.random.Generator) -> np.ndarray:
        block_of = self.samples // self.cache.spec.block_samples
        blocks = rng.permutation(np.unique(block_of))
        groups = [blocks[i : i + self._shuffle_blocks] for i in range(0, len(blocks), self._shuffle_blocks)]
        return np.concatenate([rng.permutation(self.samples[np.isin(block_of, group)]) for group in groups])

    def _grown(self, ring: list[BatchBuffers], count: int) -> list[BatchBuffers]:
        new = [
            self.cache.buffers(
                slots=min(self.batch, len(self.samples)),
                layers=self.layers,
                with_maps=self._with_maps,
                pin_memory=self._pin_memory,
            )
            for _ in range(count - len(ring))
        ]
        return [*ring, *new]

    def _start(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, buffers: BatchBuffers
    ) -> list["Future[None]"]:
        pairs = list(enumerate(rows.tolist()))
        return [
            pool.submit(self._read, pairs[thread :: self._threads], buffers)
            for thread in range(self._threads)
        ]

    def _read(self, pairs: Sequence[tuple[int, int]], buffers: BatchBuffers) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        self.cache.read_into(buffers, pairs, self.layers)
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
