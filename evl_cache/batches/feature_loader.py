"""Batches of cached features for stage two: threads fill a reused ring of buffers, straight from the shards.

B samples. No worker processes and no collate copies: features stay as they are stored and are decoded on the
device that uses them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property, partial

import numpy as np
import torch

from evl_cache.batches.batch import Batch, Hold, LoaderTimes, held
from evl_cache.batches.batch_memory import DEVICE_SLOTS, BatchMemory, DeviceSlot, HostSlot
from evl_cache.batches.device_feed import DeviceFeed
from evl_cache.batches.epoch_order import BatchPart, EpochOrder
from evl_cache.batches.reading_threads import ReadingThreads
from evl_cache.batches.resident import ResidentSamples
from evl_cache.batches.ring import PartInRing, Ring
from evl_cache.errors import UsageError
from evl_cache.notation import layers_of, whole_number
from evl_cache.store import BatchBuffers, FeatureCache, Indices, Reads, StoredBatch, TokensRead


class FeatureLoader:
    """Batches of some samples of a cache, read ahead in threads.

    Args:
        cache: open for reading.
        samples: rows, as `FeatureCache.read` takes them; failed ones are left out.
        reads: what is read of each.
        layers, with_maps, tokens: the same, where `reads` is not given.
        batch: samples of a batch, in all processes; the last of an epoch is smaller.
        shuffle_seed: the order of an epoch is drawn from (seed, epoch), and with it which of a clip's augmented
            training views the epoch has; None keeps the order, and has all.
        shuffle_blocks: 0 permutes all samples (local disks). Otherwise blocks are permuted, and samples are shuffled
            within so many of them at a time: shards are then read nearly in one piece (network and spinning disks).
        classes: the class number to serve for each class of the cache, int64; as the cache numbers them by default.
        rank, world: this process reads its part of every batch.
        threads: how many read.
        pin_memory: page-locked buffers, for who copies batches to a GPU.
        resident: keeps samples, as `reads` says, after they were first read; on a GPU, `memory` must be of that.
        memory: where batches lie, which loaders may share; `BatchMemory("cuda")` copies them to a GPU, one batch ahead.
            By default memory of the computer, of this loader alone.

    Raises: UsageError where no sample is left. CacheDamaged where a mark of their blocks is not intact, or not the one
        that the manifest names: the run would leave samples out, or take others.
    """

    def __init__(
        self,
        cache: FeatureCache,
        samples: Indices,
        *,
        batch: int,
        reads: Reads | None = None,
        layers: Sequence[int] | int = (),
        with_maps: bool = True,
        tokens: TokensRead = "all",
        shuffle_seed: int | None = None,
        shuffle_blocks: int = 0,
        classes: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        pin_memory: bool = False,
        resident: ResidentSamples | None = None,
        memory: BatchMemory | None = None,
    ) -> None:
        rows = cache.rows_of(samples)
        cache.check_marks(rows)
        self.samples = served_samples(cache, rows)
        if min(whole_number(batch) or 0, whole_number(threads) or 0) < 1:
            raise UsageError(f"batch is {batch}, threads {threads}; expected at least 1 of each")
        numbers = () if isinstance(layers, tuple | list) and not layers else layers_of(layers)
        if (reads is None) != bool(numbers):
            raise UsageError(f"layers are {list(numbers)}, reads {reads}; expected one of them")
        self.reads = reads or Reads(layers=numbers, with_maps=with_maps, tokens=tokens)
        self.cache, self.batch, self._classes = cache, batch, classes
        self.skipped_clips = int(
            np.count_nonzero(np.bincount(cache.sample_clips[rows[~cache.is_valid[rows]]]))
        )
        views = 1 if shuffle_seed is None else max(1, cache.spec.views.train_views)
        _check_views(cache, self.samples, views)
        self.times = LoaderTimes()
        self.order = EpochOrder(
            samples=self.samples,
            batch=batch,
            seed=shuffle_seed,
            block_samples=cache.spec.block_samples,
            shuffle_blocks=shuffle_blocks,
            views=views,
            rank=rank,
            world=world,
            keepers=None if resident is None else resident.keepers,
        )
        self._threads = threads
        if memory is None:
            memory = BatchMemory("cpu" if resident is None else resident.device, pin_memory=pin_memory)
        self.memory = memory
        on_device = resident is not None and memory.streams is not None and resident.device == memory.device
        self._in_ram: ResidentSamples | None = None if on_device else resident
        self._on_device: ResidentSamples | None = resident if on_device else None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.order)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each sample of the cache as it is served, int64."""
        return self.cache.labels if self._classes is None else self._classes[self.cache.labels]

    @property
    def waits_for_server(self) -> bool:
        """Whether batches may have to be waited for until a server answers."""
        return self.cache.copy is not None

    @property
    def sample_nbytes(self) -> int:
        """The bytes that are read of a sample, decompressed."""
        return self.cache.buffers(slots=1, reads=self.reads).nbytes

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's part of every batch, from batch `start_batch` on (to resume in mid-epoch).

        Batches lie in memory that is used again: to touch one that was overwritten raises BatchOverwritten, and
        `batch.clone()` keeps one. Who leaves an epoch before its end, by an error or `close`, has what waits for the server
        of `cache` raise WaitEnded, where reading threads are not done half a second later.
        """
        if min(-1 if n is None else n for n in map(whole_number, (number, start_batch))) < 0:
            raise UsageError(f"epoch {number!r} from batch {start_batch!r}; expected whole numbers from 0")
        parts = self.order.parts(number, start_batch=start_batch)
        self.times = LoaderTimes()
        left = max(1, len(self) - start_batch)
        # Taken away while in use: a second iterator makes its own.
        host, device = self._take(left)
        try:
            with ReadingThreads(self._threads, end_waits=self.cache.end_waits) as threads:
                ring = Ring(parts, host, partial(self._start, threads), self.times)
                if self.memory.streams is None:
                    yield from self._from_ring(ring)
                else:
                    feed = DeviceFeed(ring, device, self.memory.streams, self._copies)
                    yield from feed.batches(self._on_device_batch)
        finally:
            self.memory.give_back(host, device)

    def _take(self, batches: int) -> tuple[list[HostSlot], list[DeviceSlot]]:
        most = -(-min(self.batch, self.order.samples_of_epoch) // self.order.world)
        host = self.memory.take_host(self.cache, self.reads, slots=most, count=min(self.memory.ring, batches))
        if self.memory.streams is None:
            return host, []
        return host, self.memory.take_device(
            self.cache, self.reads, slots=most, count=min(DEVICE_SLOTS, batches)
        )

    def _from_ring(self, ring: Ring) -> Iterator[Batch]:
        """Yield batches where they were read."""
        while (read := ring.next()) is not None:
            labels = torch.from_numpy(self.labels[read.part.rows])
            features = read.slot.buffers.batch(len(read.part.rows))
            yield self._batch(read.part, features, labels, Hold.of(read.slot.turns))
            ring.free(read.slot)

    def _copies(self, read: PartInRing, slot: DeviceSlot) -> Callable[[], None]:
        """Return the work that puts a part into a slot on the device."""
        rows, host = read.part.rows, read.slot
        labels = host.labels[: len(rows)]
        labels.copy_(torch.from_numpy(self.labels[rows]))
        features: Callable[[], None]
        if read.is_kept is None:
            features = partial(_copy, host.buffers, slot.buffers, len(rows))
        else:
            assert self._on_device is not None
            features = self._on_device.assemble(rows, read.is_kept, host, slot.buffers)

        def work() -> None:
            slot.labels[: len(rows)].copy_(labels, non_blocking=True)
            features()

        return work

    def _on_device_batch(self, read: PartInRing, slot: DeviceSlot) -> Batch:
        count = len(read.part.rows)
        hold = Hold.of(slot.turns)
        return self._batch(read.part, slot.buffers.batch(count), slot.labels[:count], hold, slot=slot.number)

    def _batch(
        self,
        part: BatchPart,
        features: StoredBatch,
        labels: torch.Tensor,
        hold: Hold,
        slot: int | None = None,
    ) -> Batch:
        return Batch(
            features=held(features, hold),
            labels=labels,
            samples=part.rows,
            number=part.number,
            total=part.total,
            is_stand_in=part.is_stand_in,
            slot=slot,
            hold=hold,
        )

    def _start(
        self, threads: ReadingThreads, part: BatchPart, slot: HostSlot
    ) -> tuple[PartInRing, list["Future[None]"]]:
        rows, is_kept = part.rows, None
        if self._on_device is not None:
            # The others fill the first places.
            is_kept = self._on_device.holds(rows)
            rows = rows[~is_kept]
        pairs = list(enumerate(rows.tolist()))
        away = rows if self._in_ram is None else rows[~self._in_ram.holds(rows)]
        self.cache.prefetch(slot.buffers, away.tolist(), self.reads.layers)
        futures = [
            threads.submit(self._read, pairs[thread :: self._threads], slot.buffers)
            for thread in range(min(self._threads, len(pairs)))
        ]
        return PartInRing(part=part, slot=slot, is_kept=is_kept), futures

    def _read(self, pairs: Sequence[tuple[int, int]], buffers: BatchBuffers) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        if self._in_ram is None:
            self.cache.read_into(buffers, pairs, self.reads.layers)
        else:
            away = [(s, row) for s, row in pairs if not self._in_ram.load(row, buffers.stacked, s)]
            self.cache.read_into(buffers, away, self.reads.layers)
            for slot, row in away:
                self._in_ram.keep(row, buffers.stacked, slot)
        cpu = time.thread_time() - cpu
        self.times.cpu += cpu
        self.times.io += max(0.0, time.perf_counter() - wall - cpu)


def served_samples(cache: FeatureCache, samples: Indices) -> np.ndarray:
    """Return the rows that have features, int64, of the samples asked for.

    Raises: UsageError where none has; CacheDamaged where that is because marks are not intact.
    """
    rows = cache.rows_of(samples)
    served: np.ndarray = rows[cache.is_valid[rows]]
    if not len(rows):
        raise UsageError(f"{cache.place}: no sample is asked for; expected at least one")
    if not len(served):
        cache.check_marks(rows)
        raise UsageError(
            f"{cache.place}: none of the {len(rows)} samples asked for are extracted; run extract first"
        )
    return served


def _check_views(cache: FeatureCache, samples: np.ndarray, views: int) -> None:
    """Check that samples are all views of their clips, if an epoch has one view of each. Raises: UsageError."""
    if views == 1:
        return
    is_whole = len(samples) % views == 0
    if is_whole:
        by_clip = samples.reshape(-1, views)
        clips = cache.sample_clips[by_clip]
        is_whole = bool((clips == clips[:, :1]).all() and (np.diff(np.sort(by_clip, axis=1)) > 0).all())
    if not is_whole:
        raise UsageError(
            f"{cache.place}: samples are some of the {views} training views of clips, of which an epoch draws one; expected "
            "all views of each clip, one after another, as samples_of_clips gives them"
        )


def _copy(host: BatchBuffers, device: BatchBuffers, count: int) -> None:
    """Copy the first `count` slots."""
    for name, whole in device.whole.items():
        if count == host.slots == device.slots:
            whole.copy_(host.whole[name], non_blocking=True)
            continue
        # Layer by layer, each in one piece: a copy of more pieces at once would go through other memory, and wait.
        for target, source in zip(device.tensors[name], host.tensors[name], strict=True):
            target[:count].copy_(source[:count], non_blocking=True)
