"""What stage two trains on: a batch, and where the time to get it went.

B samples.
"""

from dataclasses import dataclass

import numpy as np
import torch

from evl_cache.store import StoredBatch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples.

    Attributes:
        features: in memory that is reused: they hold until the next batch is asked for.
        labels: int64 (B,), where the features are.
        samples: rows in the cache, int64 (B,).
        number: of the batch in its epoch.
        total: its samples in all processes.
        is_stand_in: see `BatchPart`.
        slot: the number of the device's buffers that features and labels lie in, at the same addresses whenever it comes
            again; None where they are not in such.
    """

    features: StoredBatch
    labels: torch.Tensor
    samples: np.ndarray
    number: int
    total: int
    is_stand_in: bool = False
    slot: int | None = None


@dataclass(kw_only=True)
class LoaderTimes:
    """Where the time of an epoch went, in seconds.

    Attributes:
        waited: that the consumer waited for batches.
        cpu: that threads decoded, summed over them.
        io: that threads waited for the disk, summed over them.
    """

    waited: float = 0.0
    cpu: float = 0.0
    io: float = 0.0

    def bottleneck(self, elapsed: float) -> str:
        """Return `device` if the consumer hardly waits, else `disk` or `processor`, which the threads wait for more."""
        if self.waited < 0.1 * elapsed:
            return "device"
        return "disk" if self.io > self.cpu else "processor"
