"""Clips decoded before the device asks for them, those of the next block too."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from evl_cache.extract.prepare import PreparedClip, begin_crop_thread

MOST_WAITING_BYTES = 512 << 20  # of prepared clips that wait; each thread may hold one more


class ClipsAhead:
    """Prepares clips in threads, in the order in which they will be asked for. `close` it.

    Args:
        prepare: makes a clip ready, by its row of the list.
        threads: how many prepare.
        waiting: prepared clips that may wait for the device, where memory allows.
        clip_bytes: size of one prepared clip.
    """

    def __init__(
        self, prepare: Callable[[int], PreparedClip], *, threads: int, waiting: int, clip_bytes: int
    ) -> None:
        self._prepare = prepare
        self._threads = ThreadPoolExecutor(
            threads, thread_name_prefix="decode", initializer=begin_crop_thread
        )
        self._most = threads + max(1, min(waiting, MOST_WAITING_BYTES // clip_bytes))
        self._ahead: deque[tuple[int, Future[PreparedClip]]] = deque()

    def of(self, rows: Sequence[int], *, likely_next: Callable[[], Sequence[int]]) -> Iterator[PreparedClip]:
        """Yield these clips in order.

        Args:
            likely_next: clips that may well be asked for afterwards; begun when all of these are begun.
        """
        if [row for row, _ in self._ahead] != list(rows[: len(self._ahead)]):
            self._drop()  # these were begun in vain: another job took their block
        begun = {row for row, _ in self._ahead}
        todo = deque(row for row in rows if row not in begun)
        is_last = False
        for _ in rows:
            while len(self._ahead) < self._most and not (is_last and not todo):
                if not todo:
                    todo.extend(likely_next())
                    is_last = True
                    continue
                row = todo.popleft()
                self._ahead.append((row, self._threads.submit(self._prepare, row)))
            yield self._ahead.popleft()[1].result()

    def _drop(self) -> None:
        while self._ahead:
            self._ahead.popleft()[1].cancel()

    def close(self, *, wait: bool) -> None:
        """Drop the clips that are not begun; `wait` until the others are done."""
        self._threads.shutdown(wait=wait, cancel_futures=True)
