"""What stage two trains on: batches, and what gives them. A cache's are made by `dataset`, live ones by `online`.

B samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from evl_cache.clips import Clip
from evl_cache.spec import CacheSpec
from evl_cache.store import StoredBatch


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

    @property
    def spec(self) -> CacheSpec:
        """What the features are."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (samples,)."""

    @property
    def sample_clips(self) -> np.ndarray:
        """int64 (samples,): row of `clips`."""

    @property
    def clips(self) -> Sequence[Clip]:
        """Every clip, in order."""

    @property
    def place(self) -> str:
        """Where it lies, as it may be shown."""

    @property
    def fingerprint(self) -> str:
        """Digest of the features."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Where the tower came from (`model`, `pretrained`), as far as it is known."""


class Loader(Protocol):
    """Batches of some samples of a source, in an order drawn anew for each epoch. See `FeatureLoader`."""

    samples: np.ndarray
    times: LoaderTimes

    @property
    def cache(self) -> Source:
        """What the samples are rows of."""

    @property
    def sample_nbytes(self) -> int:
        """Bytes of a sample as it is stored, decompressed; 0 where none is stored."""

    @property
    def skipped_clips(self) -> int:
        """Clips asked for that have no features."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int = 0, *, start_batch: int = 0) -> Iterator[Batch]:
        """Every sample once, from a batch on."""
