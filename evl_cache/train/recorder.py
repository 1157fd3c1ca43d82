"""What records computations of a device for later, and tells whether two results are the same."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

# Sums of several threads have no fixed order; a wrong mask of dropout, or another batch, is off by the whole.
_TOLERANCES = {"float32": 1e-4, "tf32": 2e-3}
_LOW_PRECISION = 2e-2
_SMALL = 1e-3  # a gradient so much smaller than the largest may be rounding alone, as that of a key's bias is

Compute = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """What records computations on a device."""

    def apart(self, compute: Compute) -> torch.Tensor:
        """Compute as when recording, but at once; needed before anything is recorded. Returns: the result."""

    def record(self, compute: Compute) -> tuple[torch.Tensor, Callable[[], None]]:
        """Record a computation. Returns: where its result will be, and what computes it anew."""

    def forget(self) -> None:
        """Give back what recordings held; none is replayed any more."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory: they are replayed one after another.

    Args:
        device: whose work is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._last: torch.cuda.CUDAGraph | None = None

    def apart(self, compute: Compute) -> torch.Tensor:
        """See `Recorder.apart`: in the stream that is recorded, so that its memory and its handles are there."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = compute()
        current.wait_stream(self._stream)
        return result

    def record(self, compute: Compute) -> tuple[torch.Tensor, Callable[[], None]]:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        pool = None if self._last is None else self._last.pool()
        try:
            with (
                torch.cuda.device(self._device),
                # Threads of the loader go on meanwhile, and may take memory: only this one's calls are watched.
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                result = compute()
        except Exception:
            _renew_generator(self._device)
            raise
        self._last = graph
        return result, graph.replay

    def forget(self) -> None:
        """See `Recorder.forget`."""
        self._last = None
        torch.cuda.empty_cache()


def _renew_generator(device: torch.device) -> None:
    """Give a device's generator a new state, to be seeded: after a failed recording older torch takes it for recorded."""
    number = torch.cuda.current_device() if str(device) == "cuda" else device.index
    fresh = torch.Generator(device=torch.device("cuda", number))
    torch.cuda.default_generators[number].graphsafe_set_state(fresh.graphsafe_get_state())


def recorder_of(device: torch.device) -> Recorder | None:
    """Return what records computations of a device; None where nothing can."""
    return CudaRecorder(device) if device.type == "cuda" else None


def tolerance_of(precision: str) -> float:
    """Return the share of a tensor's largest value that two ways to compute it in a precision may differ by."""
    return _TOLERANCES.get(precision, _LOW_PRECISION)


def first_difference(
    names: Sequence[str],
    found: Sequence[torch.Tensor | None],
    expected: Sequence[torch.Tensor | None],
    *,
    tolerance: float,
) -> str | None:
    """Return the name of the first value that is not as expected, or None.

    Args:
        tolerance: share of a tensor's largest value that its values may be off.
    """
    largest = [0.0 if value is None else float(_finite(value).abs().max()) for value in expected]
    floor = _SMALL * max(largest, default=0.0)
    for name, mine, theirs, most in zip(names, found, expected, largest, strict=True):
        if mine is None or theirs is None:
            if mine is not theirs:
                return name
            continue
        near = _finite(mine - theirs).abs() <= tolerance * max(most, floor)
        same = (
            (mine == theirs) | (mine.isnan() & theirs.isnan()) | (near & mine.isfinite() & theirs.isfinite())
        )
        if not bool(same.all()):
            return name
    return None


def _finite(values: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(values.detach(), nan=0.0, posinf=0.0, neginf=0.0)
