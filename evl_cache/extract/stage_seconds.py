"""What an extraction spends its time on."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageSeconds:
    """Seconds that a run waits for each stage, for the most part its thread that drives the device; threads may share it.

    Stages: `decoding` (waiting for frames), `transfer` (to the device), `device` (forward pass and quantisation),
    `writing` (compression and the disk).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seconds = dict.fromkeys(("decoding", "transfer", "device", "writing"), 0.0)

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage."""
        with self._lock:
            self.seconds[stage] += seconds

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add the time inside the `with` block to a stage."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - started)

    @property
    def bottleneck(self) -> str:
        """The stage that took the most time."""
        return max(self.seconds, key=self.seconds.__getitem__)
