"""A run that is asked to stop finishes its step and keeps its state first."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and its state is kept. Not an error: whoever catches those must not go on.

    Attributes:
        signal_number: of the signal that asked.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequests:
    """Notes SIGINT and SIGTERM while it is entered in the main thread; a second one acts as it did before.

    In a process that was forked meanwhile, the first one does.

    Attributes:
        signal_number: of the signal that was noted; 0 for none.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number or os.getpid() != self._pid:  # a forked child has nothing of the run to keep
            self.__exit__()
            signal.raise_signal(number)
        self.signal_number = number
