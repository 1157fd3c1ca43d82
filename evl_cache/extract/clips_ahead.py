"""Clips decoded ahead of the device, across the border of blocks."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from evl_cache.extract.prepare import PreparedClip

MOST_WAITING_BYTES = 512 << 20  # of prepared clips, beyond those in the hands of a thread


class ClipsAhead:
    """Prepares clips in threads, in the order in which they will be asked for. `close` it.

    Args:
        prepare: a clip by its row of the list. threads: that prepare.
        waiting: prepared clips that may wait for the device, where memory allows. clip_bytes: of one.
    """

    def __init__(
        self, prepare: Callable[[int], PreparedClip], *, threads: int, waiting: int, clip_bytes: int
    ) -> None:
        self._prepare = prepare
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._most = threads + max(1, min(waiting, MOST_WAITING_BYTES // clip_bytes))
        self._ahead: deque[tuple[int, Future[PreparedClip]]] = deque()

    def of(self, rows: Sequence[int], *, likely_next: Callable[[], Sequence[int]]) -> Iterator[PreparedClip]:
        """These clips in order.

        likely_next: clips that may well be asked for afterwards; begun when all of these are in work.
        """
        if self._ahead and self._ahead[0][0] != rows[0]:
            self._drop()  # begun for nothing: another job has them
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
        """What is not begun is not done any more. wait: for the rest."""
        self._threads.shutdown(wait=wait, cancel_futures=True)
