"""The loss of a step, and whether its parameters are numbers: read while the device is at the next one.

Reading a number from a GPU waits for all work that the GPU was given before it. So a step's loss is copied to the host
behind that work, and read when the next step has been given: the GPU then has work while the host prepares more.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from evl_cache.errors import NotFinite
from evl_cache.processes import Processes, StopRequests


class Diverged(NotFinite):
    """The loss of a run, its parameters or what its head says of clips has become NaN or infinite.

    Args:
        what: is so, and after which step.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: training diverged; use a lower --lr or --precision float32")


@contextmanager
def told_of_training(step: int) -> Iterator[None]:
    """Score the head of a training. Raises: Diverged, which names the step, where what it says of clips is not finite."""
    try:
        yield
    except NotFinite as error:
        what = str(error).partition(": there is no score")[0]
        raise Diverged(f"{what} after step {step}") from error


def is_read_late(device: torch.device) -> bool:
    """Whether the loss of a step is read when the next has been given: on a CPU it is there at once."""
    return device.type == "cuda"


class DeviceNumbers:
    """Numbers of a device, copied to the host without waiting for it.

    Args:
        values: (n,), which may be overwritten by whatever the device is given next.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values.detach().clone()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values.detach(), non_blocking=True)
        # A blocking event lets the waiting thread sleep: threads that read samples want its processor.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers, once the device has come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        found: list[float] = self._host.tolist()
        return found


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The mean loss of a step in all processes.

    Attributes:
        step: its number, from 1.
        value: finite.
        samples: that it is the mean of.
    """

    step: int
    value: float
    samples: int


class LossReader:
    """Reads the losses of steps in their order, and adds up those of all processes.

    All processes give and read the same steps in the same order, so none waits for another in vain.

    Args:
        processes: that train together.
        stop: signals that this process was sent; each sum tells the others of them.
        device: where losses are computed.

    Attributes:
        is_stopping: whether a process was sent a signal, by the last sum that was read; all processes have the same.
    """

    def __init__(self, processes: Processes, stop: StopRequests, device: torch.device) -> None:
        self._processes, self._stop = processes, stop
        self._is_late = is_read_late(device)
        self._unread: tuple[int, int, DeviceNumbers] | None = None
        self.is_stopping = False

    def give(self, step: int, loss: torch.Tensor, health: torch.Tensor, samples: int) -> StepLoss | None:
        """Note the loss of a step that the device was given, and what it has made of the parameters.

        Args:
            step: its number, from 1.
            loss: of this process's part, ().
            health: the largest parameter after the step, (): NaN or infinite as its gradients were. See `Optimisation.health`.
            samples: of the step, in all processes.

        Returns: the loss of the step before, or on a CPU of this one; None where the first is not read yet.
        Raises: as `read`.
        """
        numbers = DeviceNumbers(torch.stack([loss.detach(), health.to(loss.dtype)]))
        before = self.read()
        self._unread = step, samples, numbers
        return before if self._is_late else self.read()

    def read(self) -> StepLoss | None:
        """Wait for the loss that is not read yet. Returns: it, or None where all are read.

        Raises: Diverged where it is NaN or infinite, or what its step has made of the parameters is.
        """
        if self._unread is None:
            return None
        (step, samples, numbers), self._unread = self._unread, None
        loss, health = numbers.read()
        # Processes may differ in what they have: all go by the sum, and end alike.
        told = [loss, float(self._stop.signal_number), 0.0 if math.isfinite(health) else 1.0]
        sums = torch.tensor(told, dtype=torch.float64)
        loss, signals, spoiled = self._processes.add(sums, f"at step {step}").tolist()
        self.is_stopping = self.is_stopping or bool(signals)
        if not math.isfinite(loss):
            raise Diverged(f"loss is {loss} at step {step}")
        if spoiled:
            raise Diverged(f"parameters, or the logits by them, are NaN or infinite after step {step}")
        return StepLoss(step=step, value=loss, samples=samples)
