"""Signals that come where Python would lose their exception, or what they interrupt: they come again a moment later."""

import _thread
import os
import signal
import sys
import threading
import time
from types import FrameType

_AGAIN_S = 0.05
_MOST_PUT_OFF = 30  # then it ends the command wherever it is: a second and a half
_put_off = 0


def come_again() -> None:
    """From now on, a signal whose exception was dropped comes again: it came in a `__del__` or as a weak reference died.

    Python prints such an exception and goes on, so that a command would not end (https://docs.python.org/3/library/signal.html).
    """
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def is_put_off(number: int, frame: FrameType | None) -> bool:
    """Whether a signal comes again later, as a thread is being joined now, which it is told to end.

    Up to Python 3.12 an exception in the midst of `Thread.join` has the thread pass for ended
    (https://bugs.python.org/issue45274): the process would go without it, and leave its locks and staged files.
    """
    global _put_off
    if frame is None or frame.f_code.co_filename != threading.__file__ or _put_off >= _MOST_PUT_OFF:
        return False
    if frame.f_code.co_name not in ("_wait_for_tstate_lock", "_shutdown"):
        return False
    _put_off += 1
    _thread.start_new_thread(_send, (number,))
    return True


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
