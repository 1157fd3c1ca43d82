"""What a device does in order: a stream of copies beside the stream that computes, and marks that order the two."""

from collections.abc import Callable
from typing import Protocol, cast

import torch


class Mark(Protocol):
    """A point in a stream: passed when all work given before it is done. `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it is passed."""

    def synchronize(self) -> None:
        """Return when it is passed."""


class Streams(Protocol):
    """Two queues of a device. Whoever gives work does not wait for it."""

    def copy(self, work: Callable[[], None]) -> Mark:
        """Put work into the stream of copies. Returns: the mark behind it."""

    def copy_after(self, mark: Mark) -> None:
        """Have later copies wait until a mark is passed."""

    def use_after(self, mark: Mark) -> None:
        """Have what is computed from now on wait until a mark is passed."""

    def mark_use(self) -> Mark:
        """Return a mark behind what is computed so far."""


class CudaStreams:
    """Streams of a CUDA device: one of its own for copies, and whichever is current where batches are used.

    Args:
        device: with its number.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, work: Callable[[], None]) -> Mark:
        """Enqueue work. Returns: the mark behind it."""
        with torch.cuda.stream(self._copies):
            work()
        return _marked(self._copies)

    def copy_after(self, mark: Mark) -> None:
        """Have later copies wait for a mark."""
        self._copies.wait_event(cast(torch.cuda.Event, mark))

    def use_after(self, mark: Mark) -> None:
        """Have the current stream wait for a mark."""
        torch.cuda.current_stream(self._device).wait_event(cast(torch.cuda.Event, mark))

    def mark_use(self) -> Mark:
        """Return a mark behind what the current stream was given."""
        return _marked(torch.cuda.current_stream(self._device))


def numbered(device: str | torch.device) -> torch.device:
    """Return a device with its number, where it is a GPU: the current one's, where nobody said which."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else torch.device(device)
    )


def _marked(stream: torch.cuda.Stream) -> Mark:
    # A thread that waits for it leaves its processor to those that read.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
