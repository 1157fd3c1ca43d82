"""Batches of cached features for stage two, read ahead by threads.

B samples. Features stay as they are stored: they are dequantised on the device that uses them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from evl_cache.errors import UsageError
from evl_cache.store import FeatureCache, StoredBatch

_THREADS = 2
_BATCHES_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Features of B samples, their labels int64 (B,) and their rows in the cache int64 (B,)."""

    features: StoredBatch
    labels: torch.Tensor
    samples: np.ndarray


class FeatureLoader:
    """Reads batches of some samples of a cache.

    Args:
        cache: open for reading. samples: rows; failed ones are left out.
        layers: blocks. with_maps: read the maps too.
        batch: samples of a batch; the last of an epoch is smaller.
        shuffle_seed: order of an epoch is a permutation drawn from (seed, epoch); None keeps the order.

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
    ) -> None:
        rows = np.asarray(samples, dtype=np.int64)
        self.samples = rows[cache.is_valid[rows]]
        if len(self.samples) == 0:
            raise UsageError(
                f"{cache.path}: none of the {len(rows)} samples asked for is extracted; run extract first"
            )
        if batch < 1:
            raise UsageError(f"batch is {batch}; expected at least 1")
        self.cache, self.layers, self.batch = cache, tuple(layers), batch
        self._with_maps, self._seed = with_maps, shuffle_seed

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.samples) // self.batch)

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """Every sample once. The same number gives the same order."""
        order = self.samples
        if self._seed is not None:
            order = np.random.default_rng([self._seed, number]).permutation(order)
        parts = iter([order[start : start + self.batch] for start in range(0, len(order), self.batch)])
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                while True:
                    while len(ahead) < _BATCHES_AHEAD and (part := next(parts, None)) is not None:
                        ahead.append(pool.submit(self._read, part))
                    if not ahead:
                        return
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _read(self, rows: np.ndarray) -> Batch:
        features = self.cache.read_stored(rows.tolist(), self.layers, with_maps=self._with_maps)
        return Batch(features=features, labels=torch.from_numpy(self.cache.labels[rows]), samples=rows)


def samples_of_clips(cache: FeatureCache, clips: Sequence[int] | None) -> np.ndarray:
    """Rows of the samples of some clips (all by default), int64."""
    if clips is None:
        return np.arange(len(cache), dtype=np.int64)
    return np.flatnonzero(np.isin(cache.sample_clips, np.asarray(clips, dtype=np.int64)))
