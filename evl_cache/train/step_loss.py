"""The loss of a step, which is read while the device is at the next one.

Reading a number from a GPU waits for all work that the GPU was given before it. So a step's loss is copied to the host
behind that work, and read when the next step has been given: the GPU then has work while the host prepares more.
"""

import math
from dataclasses import dataclass

import torch

from evl_cache.errors import UsageError
from evl_cache.processes import Processes, StopRequests


class Diverged(UsageError):
    """The loss of a run has become NaN or infinite."""


def is_read_late(device: torch.device) -> bool:
    """Whether the loss of a step is read when the next has been given: on a CPU it is there at once."""
    return device.type == "cuda"


class DeviceNumber:
    """A number of a device, copied to the host without waiting for it.

    Args:
        value: (), which may be overwritten by whatever the device is given next.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if value.device.type != "cuda":
            self._host = value.detach().clone()
            return
        self._host = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._host.copy_(value.detach(), non_blocking=True)
        # A blocking event lets the waiting thread sleep: threads that read samples want its processor.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Return the number, once the device has come so far."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._host)


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The mean loss of a step in all processes.

    Attributes:
        step: its number, from 1.
        value: finite.
    """

    step: int
    value: float


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
        self._unread: tuple[int, DeviceNumber] | None = None
        self.is_stopping = False

    def give(self, step: int, loss: torch.Tensor) -> StepLoss | None:
        """Note the loss of a step that the device was given.

        Args:
            step: its number, from 1.
            loss: of this process's part, ().

        Returns: the loss of the step before, or on a CPU of this one; None where the first is not read yet.
        Raises: Diverged where the loss that is read is NaN or infinite.
        """
        number = DeviceNumber(loss)
        before = self.read()
        self._unread = step, number
        return before if self._is_late else self.read()

    def read(self) -> StepLoss | None:
        """Wait for the loss that is not read yet. Returns: it, or None where all are read.

        Raises: Diverged where it is NaN or infinite.
        """
        if self._unread is None:
            return None
        (step, number), self._unread = self._unread, None
        sums = torch.tensor([number.read(), float(self._stop.signal_number)], dtype=torch.float64)
        loss, signals = self._processes.add(sums, f"at step {step}").tolist()
        self.is_stopping = self.is_stopping or bool(signals)
        if not math.isfinite(loss):
            raise Diverged(
                f"loss is {loss} at step {step}: training diverged; use a lower --lr or --precision float32"
            )
        return StepLoss(step=step, value=loss)
