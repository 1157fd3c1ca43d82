"""What an extraction spends its time on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageSeconds:
    """What the thread that drives the device spends its time on: what takes the most is what the run waits for.

    Stages: `decoding` (no frames there yet), `transfer` (to the device), `device` (forward pass and quantisation),
    `writing` (compression and the disk).
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("decoding", "transfer", "device", "writing"), 0.0)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - started

    @property
    def bottleneck(self) -> str:
        """The stage that took the most time."""
        return max(self.seconds, key=self.seconds.__getitem__)
