"""Clips decoded before the device asks for them, those of the next block too."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from evl_cache.extract.prepare import PreparedClip, begin_crop_thread

MOST_WAITING_BYTES = 512 << 20  # of prepared clips that wait; each thread may hold one more
Prepare = Callable[[int], PreparedClip]


class ClipsAhead:
    """Prepares clips in threads, in the order in which they were added. `close` it.

    Args:
        threads: how many prepare.
        waiting: prepared clips that may wait for the device, where memory allows.
        clip_bytes: size of one prepared clip.
        on_drained: called, from any thread, when no added clip is left to be begun.
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
        self._most = threads + max(1, min(waiting, MOST_WAITING_BYTES // clip_bytes))
        self._on_drained = on_drained
        self._lock = threading.Lock()
        self._todo: deque[_Ahead] = deque()
        self._held = 0  # clips that are begun, and that nobody has taken

    @property
    def is_drained(self) -> bool:
        """Whether no clip is left to be begun: more may be added."""
        return not self._todo

    def add(self, rows: Sequence[int], prepare: Prepare) -> Iterator[PreparedClip]:
        """Have clips prepared after all that were added before. Yields them in order.

        Args:
            prepare: makes a clip ready, by its row of the list.
        """
        added = deque(_Ahead(row, prepare) for row in rows)
        with self._lock:
            self._todo.extend(added)
        self._begin_some()
        return self._taken(added)

    def _taken(self, added: "deque[_Ahead]") -> Iterator[PreparedClip]:
        while added:
            clip = added.popleft()
            with self._lock:
                if clip.future is None:  # out of turn: those before it are for others to take
                    self._todo.remove(clip)
                    self._begin(clip)
                future = clip.future
            assert future is not None
            try:
                prepared = future.result()
            finally:
                with self._lock:
                    self._held -= 1
                self._begin_some()
            yield prepared
            del prepared, future, clip  # the clip is its taker's alone

    def _begin_some(self) -> None:
        with self._lock:
            while self._todo and self._held < self._most:
                self._begin(self._todo.popleft())
            is_drained = not self._todo
        if is_drained:
            self._on_drained()

    def _begin(self, clip: "_Ahead") -> None:
        self._held += 1
        clip.future = self._threads.submit(clip.prepare, clip.row)

    def close(self, *, wait: bool) -> None:
        """Drop the clips that are not begun; `wait` until the others are done."""
        with self._lock:
            self._todo.clear()
        self._threads.shutdown(wait=wait, cancel_futures=True)


class _Ahead:
    """A clip that was added, and what becomes of it once it is begun."""

    def __init__(self, row: int, prepare: Prepare) -> None:
        self.row, self.prepare = row, prepare
        self.future: Future[PreparedClip] | None = None
