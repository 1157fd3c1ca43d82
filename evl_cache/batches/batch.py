"""What stage two trains on: batches, and what gives them. A cache's are made by `dataset`, live ones by `online`.

B samples.
"""

from dataclasses import dataclass

import numpy as np
import torch

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
