"""Signals that come while Python runs a callback of its own, whose exceptions it drops."""

import _thread
import os
import signal
import sys
import time

_AGAIN_S = 0.05


def come_again() -> None:
    """From now on, a signal whose exception was dropped comes again: it came in a `__del__` or as a weak reference died.

    Python prints such an exception and goes on, so that a command would not end (https://docs.python.org/3/library/signal.html).
    """
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


class _Hook:
    def __init__(self, before: object) -> None:
        self._before = before

    def __call__(self, dropped: "sys.UnraisableHookArgs", /) -> None:
        number = _signal_of(dropped.exc_value)
        if number is None:
            self._before(dropped)  # type: ignore[operator]
        else:
            # Not by `threading`, whose locks the code that was interrupted may hold.
            _thread.start_new_thread(_send, (number,))


def _signal_of(error: BaseException | None) -> int | None:
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return signal.SIGTERM if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM else None


def _send(number: int) -> None:
    time.sleep(_AGAIN_S)  # the callback has ended by then, most likely; else it comes once more
    os.kill(os.getpid(), number)
