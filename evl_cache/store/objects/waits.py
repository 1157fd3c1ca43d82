"""Waits for servers: how long, what is said meanwhile, and how they end.

A request runs on a thread of its own, which may be stuck in the system (a silent server, a name that no server resolves);
who asked waits beside it and can be called away at any moment. What failed and may pass is asked for again until patience
ends, which is counted in time and not in attempts: a server that is started again takes as long as it takes.
"""

import contextlib
import functools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from evl_cache.errors import CacheError, Unreachable, UsageError, WaitEnded
from evl_cache.notation import escaped
from evl_cache.standstill import Standstill
from evl_cache.store.objects.troubles import Trouble

PATIENCE_VARIABLE = "EVL_CACHE_SERVER_PATIENCE"
_PATIENCE_S = 120.0
_FIRST_PATIENCE_S = 10.0  # for a server that never answered: the address may be wrong
_SILENCE_S = 30.0  # so long without the bytes below, and an answer has failed
_LEAST_NBYTES = 4096
_FIRST_WAIT_S, _LONGEST_WAIT_S = (
    0.25,
    15.0,
)  # before it is asked again; each is drawn, so that not all come at once
_TOLD_AFTER_S, _TOLD_EVERY_S = 3.0, 30.0
_LOOK_EVERY_S = 0.1  # whether the wait is to end

_asked: list[Callable[[], bool]] = []
_answered: set[str] = set()  # servers that did, in this process
_log = logging.getLogger("evl_cache")
_T = TypeVar("_T")


@contextlib.contextmanager
def waits_end_when(asked: Callable[[], bool]) -> Iterator[None]:
    """While this is entered, end every wait for a server, in any thread, as soon as `asked` says so: WaitEnded is raised."""
    _asked.append(asked)
    try:
        yield
    finally:
        _asked.remove(asked)


def end_all_waits() -> None:
    """End every wait for a server, in any thread, and those to come: the process is about to end."""
    _asked.append(lambda: True)


def are_waits_ending() -> bool:
    """Whether every wait is to end, by `waits_end_when` or `end_all_waits`."""
    return any(asked() for asked in list(_asked))


@functools.cache
def end_with_interpreter() -> None:
    """Have waits end where the interpreter does, by an error of other work too.

    It joins the threads of pools first of all, before `atexit`; each that waits for a silent server would keep it.
    """
    threading._register_atexit(end_all_waits)  # type: ignore[attr-defined]


class Attempt:
    """One request, on a thread of its own, which ends with the process if not before.

    Attributes:
        done: set when it has ended.
        moved: when bytes last came, or it began, by the monotonic clock.
        has_begun: whether any bytes came.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.moved = time.monotonic()
        self.has_begun = False
        self._since_moved = 0
        self._is_given_up = False
        self._break_off: Callable[[], None] | None = None
        self._result: Any = None
        self._error: BaseException | None = None

    def start(self, request: "Callable[[Attempt], Any]") -> None:
        """Begin. Raises: CacheError where the system gives no thread."""
        try:
            threading.Thread(target=self._run, args=(request,), name="request", daemon=True).start()
        except RuntimeError as error:
            raise CacheError(
                f"no thread for a request ({error}); raise the limit of processes (ulimit -u)"
            ) from error

    def give_up(self) -> None:
        """Have it end, as nobody waits for it any more: a trickle would keep a thread and a connection for days."""
        self._is_given_up = True
        if (break_off := self._break_off) is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # it has ended meanwhile
                break_off()

    def reads(self, break_off: Callable[[], None]) -> None:
        """Note how to end the reading of an answer, from another thread. Raises: Trouble, once given up."""
        self._break_off = break_off
        if self._is_given_up:
            raise Trouble.silence(has_begun=True)

    def came(self, nbytes: int) -> None:
        """Note that bytes came. A trickle is silence: else it could go on for days. Raises: Trouble, once given up."""
        if self._is_given_up:
            raise Trouble.silence(has_begun=True)
        self.has_begun = True
        self._since_moved += nbytes
        if self._since_moved >= _LEAST_NBYTES:
            self._since_moved, self.moved = 0, time.monotonic()

    def result(self) -> Any:
        """Return what the request returned. Raises: what it raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, request: "Callable[[Attempt], Any]") -> None:
        try:
            self._result = request(self)
        except BaseException as error:  # raised where it is waited for
            self._error = error
        finally:
            self.done.set()


class Server:
    """A server that is asked, and the waits for it. Threads may share it.

    Args:
        name: by which it is known to have answered in this process: of the host, or the bucket.
    """

    def __init__(self, name: str) -> None:
        end_with_interpreter()
        self.name = name
        self._ended = 0  # how often all waits were ended
        self._told = float("-inf")

    def end_waits(self) -> None:
        """End what waits now, in whatever thread: it raises WaitEnded. Later calls wait again."""
        self._ended += 1

    def ask(self, place: str, request: Callable[[Attempt], _T]) -> _T:
        """Return what a request returns, which is made again while what fails may pass and patience lasts.

        Args:
            place: what is asked for, as it may be shown.
            request: is called on another thread, tells the attempt what comes, and raises Trouble where it fails.

        Raises: Unreachable where it fails for good; WaitEnded; what else the request raises.
        """
        wait = _Wait(self, place)
        while True:
            attempt = Attempt()
            try:
                attempt.start(request)
                try:
                    wait.until_done(attempt)
                except BaseException:  # a signal, too
                    attempt.give_up()
                    raise
                found: _T = attempt.result()
                _answered.add(self.name)
                return found
            except FileNotFoundError:
                _answered.add(self.name)
                raise
            except Trouble as trouble:
                if trouble.has_answered:
                    _answered.add(self.name)
                wait.before_next(attempt, trouble)

    def check_ended(self, ended_before: int, place: str) -> None:
        """Raises: WaitEnded where waits were ended since they had been ended so often."""
        if self._ended != ended_before or are_waits_ending():
            raise WaitEnded(f"{place}: no longer waited for")

    @property
    def times_ended(self) -> int:
        """How often all waits were ended."""
        return self._ended

    def tell(self, text: str) -> None:
        """Say what is waited for, on stderr unless logging is set up otherwise; many threads may wait at once."""
        now = time.monotonic()
        if now - self._told >= _TOLD_EVERY_S:
            self._told = now
            _log.warning("%s", escaped(text))


class _Wait:
    """One call's wait for a server, over all its attempts."""

    def __init__(self, server: Server, place: str) -> None:
        self._server, self._place = server, place
        self._ended = server.times_ended
        self._since: float | None = None  # when it began to fail
        self._failures = 0
        self._last: Trouble | None = None
        self._standstill = Standstill()

    @property
    def _patience_s(self) -> float:
        patience = patience_s()
        return patience if self._server.name in _answered else min(patience, _FIRST_PATIENCE_S)

    def until_done(self, attempt: Attempt) -> None:
        """Wait for an attempt. Raises: Trouble where nothing comes; WaitEnded."""
        self._standstill.begin(attempt.moved)
        while True:
            is_done = attempt.done.wait(_LOOK_EVERY_S)
            if stood_s := self._look():
                attempt.moved = min(attempt.moved + stood_s, time.monotonic())  # bytes may have come since
            if is_done:
                return
            self._server.check_ended(self._ended, self._place)
            now = time.monotonic()
            silent_s = now - attempt.moved
            patience = self._patience_s
            left = min(_SILENCE_S, patience)
            if self._since is not None:
                left = min(left, self._since + patience - attempt.moved)
            if silent_s > left:
                if self._last is not None and silent_s < min(_SILENCE_S, patience):
                    raise self._last  # there was no time left to answer, and that is not what was wrong
                raise Trouble.silence(has_begun=attempt.has_begun)
            if silent_s > _TOLD_AFTER_S:
                self._tell("it does not answer", attempt.moved)

    def before_next(self, attempt: Attempt, trouble: Trouble) -> None:
        """Wait before the next attempt. Raises: Unreachable where there is none; WaitEnded."""
        now, self._last = time.monotonic(), trouble
        if self._since is None:
            self._since = attempt.moved
        failing_s = now - self._since
        left_s = self._patience_s - failing_s
        pause = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._failures) * random.uniform(0.5, 1.0)
        pause = min(pause, left_s)  # the last attempt comes where patience ends
        if trouble.retry_after_s is not None:
            pause = max(trouble.retry_after_s, _FIRST_WAIT_S)
        self._failures += 1
        if not trouble.may_pass or left_s <= 0 or pause > left_s:
            raise Unreachable(f"{self._place}: {trouble.told(failing_s)}") from trouble
        until = now + pause
        self._standstill.begin(now)
        while (left := until - time.monotonic()) > 0:
            self._server.check_ended(self._ended, self._place)
            if time.monotonic() - self._since > _TOLD_AFTER_S or pause > _TOLD_AFTER_S:
                self._tell(trouble.reason, self._since)
            time.sleep(min(left, _LOOK_EVERY_S))
            self._look()

    def _look(self) -> float:
        """Return for how long this process stood still since the last look, which is no time of the server's."""
        stood_s = self._standstill.look(_LOOK_EVERY_S)
        if self._since is not None:
            self._since += stood_s
        return stood_s

    def _tell(self, reason: str, since: float) -> None:
        left = (self._since or since) + self._patience_s - time.monotonic()
        self._server.tell(f"waiting for {self._place}: {reason}; for up to {max(left, 0):.0f} s more")


def patience_s() -> float:
    """Return how long a server that has answered before is waited for. Raises: UsageError for what is no time."""
    named = os.environ.get(PATIENCE_VARIABLE)
    if not named:
        return _PATIENCE_S
    try:
        seconds = float(named)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e7:
        raise UsageError(f"{PATIENCE_VARIABLE} is {named!r}; expected seconds above 0, such as 600")
    return seconds
