"""Clips decoded before the device asks for them, those of the next block too."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter

import torch

from evl_cache.extract.prepare import PreparedClip, begin_crop_thread

MOST_WAITING_BYTES = (
    512 << 20
)  # of prepared clips that wait; each thread may hold one more, and one group as much again
Prepare = Callable[[Sequence[int]], Sequence[PreparedClip]]


class ClipsAhead:
    """Prepares clips in threads, in the order in which they were added. `close` it.

    Args:
        threads: how many prepare.
        waiting: prepared clips that may wait for the device, where memory allows.
        clip_bytes: size of one prepared clip.
        on_drained: called, from any thread, when no added clip is left to be begun.

    Attributes:
        most_together: clips that one thread may prepare together, so that they do not fill the memory.
    """

    def __init__(
        self, *, threads: int, waiting: int, clip_bytes: int, on_drained: Callable[[], None] = lambda: None
    ) -> None:
        self._threads = ThreadPoolExecutor(
            threads,
            thread_name_prefix="decode",
            initializer=begin_crop_thread,
            initargs=(torch.get_num_threads() > 1,),
        )
        self.most_together = max(1, MOST_WAITING_BYTES // clip_bytes)
        self._most = threads + min(max(1, waiting), self.most_together)
        self._on_drained = on_drained
        self._lock = threading.Lock()
        self._todo: deque[_Group] = deque()
        self._held = 0  # clips that are begun, and that nobody has taken

    @property
    def is_drained(self) -> bool:
        """Whether no clip is left to be begun: more may be added."""
        return not self._todo

    def add(self, groups: Sequence[Sequence[int]], prepare: Prepare) -> Iterator[PreparedClip]:
        """Have clips prepared after all that were added before. Yields them in the order of their rows.

        Args:
            groups: rows of the list; those of a group are prepared together, when the first of them is its turn.
            prepare: makes the clips of a group ready, by their rows.
        """
        added = [_Group(rows, prepare) for rows in groups]
        with self._lock:
            self._todo.extend(added)
        self._begin_some()
        return self._taken(
            deque(sorted(((row, group) for group in added for row in group.rows), key=itemgetter(0)))
        )

    def _taken(self, added: "deque[tuple[int, _Group]]") -> Iterator[PreparedClip]:
        while added:
            row, group = added.popleft()
            with self._lock:
                if group.future is None:  # out of turn: those before it are for others to take
                    self._todo.remove(group)
                    self._begin(group)
                future = group.future
            assert future is not None
            try:
                prepared = future.result().pop(row)
            finally:
                with self._lock:
                    self._held -= 1
                self._begin_some()
            yield prepared
            del prepared, future, group  # the clip is its taker's alone

    def _begin_some(self) -> None:
        with self._lock:
            while self._todo and self._held < self._most:
                self._begin(self._todo.popleft())
            is_drained = not self._todo
        if is_drained:
            self._on_drained()

    def _begin(self, group: "_Group") -> None:
        self._held += len(group.rows)
        group.future = self._threads.submit(group.made)

    def close(self, *, wait: bool) -> None:
        """Drop the clips that are not begun; `wait` until the others are done."""
        with self._lock:
            self._todo.clear()
        self._threads.shutdown(wait=wait, cancel_futures=True)


class _Group:
    """Clips that were added to be prepared together, and what becomes of them once they are begun."""

    def __init__(self, rows: Sequence[int], prepare: Prepare) -> None:
        self.rows, self._prepare = rows, prepare
        self.future: Future[dict[int, PreparedClip]] | None = None

    def made(self) -> dict[int, PreparedClip]:
        """Prepare them, and return them by row."""
        return dict(zip(self.rows, self._prepare(self.rows), strict=True))
