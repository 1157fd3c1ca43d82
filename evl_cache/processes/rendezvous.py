"""Processes that reach each other share out which block each tries next.

The rendezvous store is torch's TCPStore at MASTER_ADDR:MASTER_PORT: that of torchrun's agent, or else of the first
process. It saves work and guards nothing: whoever cannot reach it goes by the locks on the disk.
"""

import os
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from evl_cache.processes.master import master, port_trouble
from evl_cache.processes.place import ProcessPlace

CONNECT_TIMEOUT_S = 300.0
PATIENCE_S = 5.0


class NumberStore(Protocol):
    """The part of a rendezvous store that is used."""

    def add(self, key: str, amount: int, /) -> int:
        """The number under `key`, `amount` larger than before. Raises: RuntimeError where it cannot be reached."""
        ...


class Rendezvous:
    """Numbers 0, 1, 2, …, each of which one of the processes that reach the store gets.

    Who waits for an answer that does not come is let go, and gets it when the network is back.

    Args:
        connect: opens the store; called in a thread.
        place: which process this is.
        on_lost: called once with the reason, where the store will not answer any more, and there is still something to
            ask for: the process that keeps the store ends when all is done, which is no loss.
        patience_s: how long the first to ask waits for an answer.
    """

    def __init__(
        self,
        connect: Callable[[], NumberStore],
        *,
        place: ProcessPlace,
        on_lost: Callable[[str], None] = lambda reason: None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._connect, self._place, self._on_lost, self._patience_s = connect, place, on_lost, patience_s
        self._asked: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[str, int | str]] = queue.SimpleQueue()
        self._awaited: str | None = None
        self._lost: str | None = None  # why, until it is said
        self._is_lost = False
        # No pool: an interpreter that ends would wait for a call that the network has swallowed.
        threading.Thread(target=self._serve, name="rendezvous", daemon=True).start()

    @classmethod
    def of_environment(
        cls,
        place: ProcessPlace,
        *,
        on_lost: Callable[[str], None] = lambda reason: None,
        patience_s: float = PATIENCE_S,
    ) -> "Rendezvous | None":
        """Use the store that MASTER_ADDR and MASTER_PORT name; None without them, or for a process alone.

        Raises: UsageError for a port that is none.
        """
        if place.world == 1 or not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
            return None
        address, port = master()
        hosts = place.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)

        def connect() -> NumberStore:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            try:
                store: NumberStore = TCPStore(
                    address,
                    port,
                    is_master=hosts,
                    timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            except RuntimeError as error:
                if told := port_trouble(error, port):
                    raise RuntimeError(told) from error
                raise
            return store

        return cls(connect, place=place, on_lost=on_lost, patience_s=patience_s)

    def next(self, name: str) -> int | None:
        """The next number of a series, or None where the store does not answer (now).

        To be asked for only while there is something to do: who asks again after a loss is told of it.
        """
        if self._is_lost:
            if self._lost is not None:
                reason, self._lost = self._lost, None
                self._on_lost(reason)
            return None
        is_new = self._awaited is None
        if self._awaited is None:
            self._awaited = name
            self._asked.put(f"evl-cache/{name}/{self._place.restarts}")
        try:
            asked, answer = self._answers.get(block=is_new, timeout=self._patience_s if is_new else None)
        except queue.Empty:
            return None
        self._awaited = None
        if isinstance(answer, str):
            self._is_lost, self._lost = True, answer
            return None
        return answer if asked == f"evl-cache/{name}/{self._place.restarts}" else None

    def _serve(self) -> None:
        try:
            store = self._connect()
            while True:
                key = self._asked.get()
                self._answers.put((key, store.add(key, 1) - 1))
        except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
            lines = str(error).splitlines()
            self._answers.put(("", lines[0][:200] if lines else type(error).__name__))
