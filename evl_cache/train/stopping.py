"""A training that is asked to stop while it waits: for a server, or for another process that waits for one."""

import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import torch

from evl_cache.batches import Batch
from evl_cache.errors import EvlCacheError, WaitEnded
from evl_cache.processes import Processes, StopRequests, ToldElsewhere

_LOOK_S = 0.2


class Stopping:
    """What the processes of a training tell each other of signals while one of them waits for a server.

    The others then wait for that process, in a call that no signal interrupts, and a signal may come to one of them alone.
    So all agree that each has what it waits for before they go on together. Whoever was sent a signal meanwhile leaves
    word for the others, and their waits end by it. All processes make one, and wait, together.

    Args:
        processes: that train together.
        stop: signals that this process was sent.
        waits_for_server: whether this process may have to wait for one; if none has, nothing is agreed.
    """

    def __init__(self, processes: Processes, stop: StopRequests, *, waits_for_server: bool) -> None:
        self._processes, self._stop = processes, stop
        told = processes.gather((secrets.token_hex(8), waits_for_server), "while preparing the run")
        self._word, self._agrees = f"stop-{told[0][0]}", processes.place.world > 1 and any(w for _, w in told)
        self._has_left_word = self._is_told = False
        self._look_at = 0.0

    @property
    def is_asked(self) -> bool:
        """Whether this process was sent a signal, or knows that another one was."""
        return bool(self._stop.signal_number) or self._is_told

    @property
    def signal_number(self) -> int:
        """The signal that this process was sent; where another one was, SIGTERM."""
        return self._stop.signal_number or signal.SIGTERM

    def ends_waits(self) -> bool:
        """Whether waits for servers are to end. Any thread may ask, often."""
        if not self.is_asked and self._agrees and monotonic() >= self._look_at:
            self._look_at = monotonic() + _LOOK_S
            self._is_told = self._processes.has_word(self._word)
        return self.is_asked

    def together(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches, each when all processes have theirs. Raises: as `waiting`."""
        while True:
            with self.waiting("while waiting for a batch"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def waiting(self, when: str) -> Iterator[None]:
        """Wait for a server inside; leave when all processes have what they wait for.

        Raises: what is raised inside; in the others WaitEnded where the wait of one was ended, ToldElsewhere where one failed.
        """
        if not self._agrees:
            yield
            return
        mine: EvlCacheError | OSError | None = None
        try:
            yield
        except (EvlCacheError, OSError) as error:
            mine = error
        is_ended = isinstance(mine, WaitEnded)
        told = torch.tensor([is_ended, mine is not None and not is_ended, self.is_asked], dtype=torch.float64)
        ended, failed, asked = self._processes.add(told, when, meanwhile=self._leave_word).tolist()
        self._is_told = self._is_told or asked > 0
        if failed:
            raise (
                mine if mine is not None and not is_ended else ToldElsewhere(f"another process failed {when}")
            )
        if ended:
            raise mine or WaitEnded(f"another process of the run was called away {when}")

    def _leave_word(self) -> None:
        if self._stop.signal_number and not self._has_left_word:
            self._has_left_word = True
            self._processes.leave_word(self._word)
