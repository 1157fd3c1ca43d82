"""Decode in worker processes, so that a crash, hang or leak of a decoder fails one clip and not the run.

T frames asked for, H and W source pixels.
"""

import errno
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from evl_cache.errors import ClipError, Outage, UsageError, WorkerError
from evl_cache.video import Choose, ClipHeader, DecodeOptions, FrameEvent, Length
from evl_cache.video.process import DecodeProcess, WorkerLost
from evl_cache.video.user_limits import said_of_memory

DEFAULT_TIMEOUT_S = 120.0
_MOST_TIMEOUT_S = 1e6  # a socket takes no infinity
MOST_GROWTH_BYTES = 64 << 20  # a process that has grown by more is replaced
HELD_BYTES = 64 << 20  # of one clip's frames, taken from a process before the caller asks for them
_START_REMEDY = "look whether the disk of this Python and the system's limits are in order"


class DecodePool:
    """Processes that decode; as a context manager it ends them.

    `frames` may be called from several threads; each waits for a free process.

    Args:
        workers: number of processes.
        options: how to decode.
        timeout_s: seconds for one clip, after which its process is killed.

    Raises: UsageError for a time that is none.
    """

    def __init__(
        self, workers: int, *, options: DecodeOptions | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        if not timeout_s > 0:
            raise UsageError(f"a clip may be decoded for {timeout_s} s; expected more than 0 seconds")
        self._options, self._timeout_s = options or DecodeOptions(), min(timeout_s, _MOST_TIMEOUT_S)
        # None stands for a process that is started when it is first needed.
        self._free: queue.SimpleQueue[DecodeProcess | None] = queue.SimpleQueue()
        self._all: set[DecodeProcess] = set()
        self._changing = threading.Lock()
        # Linux ends these processes with the thread that started them, so one long-lived thread starts all.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decode-start")
        self._closed = False
        self._has_started = False  # whether any process has
        for _ in range(workers):
            self._free.put(None)

    def frames(self, path: str | Path, choose: Choose) -> Iterator[FrameEvent]:
        """Yield what `video.decode_frames` yields, decoded in a process; the caller's own time does not count.

        Up to `HELD_BYTES` of a clip's frames are held here, and once its last ones are, the process is free again. A
        longer clip waits for the caller, so memory does not grow with clips.

        Raises: ClipError also where the process crashes or takes too long; Outage where a process is killed from
            outside or cannot be started now; WorkerError where none ever could.
        """
        held: deque[FrameEvent] = deque()
        num_bytes = 0
        try:
            with self._free_worker() as worker:
                for event in worker.frames(path, choose, self._timeout_s):
                    if isinstance(event, ClipHeader):
                        held.clear()  # frames that were decoded in vain
                        num_bytes = 0
                    held.append(event)
                    num_bytes += _nbytes(event)
                    while num_bytes > HELD_BYTES:
                        num_bytes -= _nbytes(held[0])
                        yield held.popleft()
        except WorkerLost as lost:
            raise ClipError(f"{path}: {lost}") from lost
        while held:
            yield held.popleft()

    def doubt(self, path: str | Path, decoder: str) -> str | None:
        """Return what `video.doubt` returns, found out in a process.

        Args:
            path: of the video.
            decoder: that served its frames once, as a mark names it.

        Raises: as `frames`.
        """
        try:
            with self._free_worker() as worker:
                return worker.doubt(path, decoder, self._timeout_s)
        except WorkerLost as lost:
            raise ClipError(f"{path}: {lost}") from lost

    def length(self, path: str | Path) -> Length:
        """Return what `video.told_length` returns, found out in a process.

        Raises: ClipError where the file is to blame; WorkerError where the process was lost, as after too long a wait.
        """
        try:
            with self._free_worker() as worker:
                return worker.length(path, self._timeout_s)
        except WorkerLost as lost:
            raise WorkerError(f"{path}: {lost}") from lost

    @contextmanager
    def _free_worker(self) -> Iterator[DecodeProcess]:
        worker: DecodeProcess | None = self._free.get()
        try:
            if worker is None:
                worker = self._start()
            yield worker
        except BaseException as error:
            self._note_start(worker)
            if not isinstance(error, ClipError):
                self._end(worker)
                worker = None
            if self._closed and isinstance(error, WorkerLost):
                raise _stopped() from error
            if isinstance(error, WorkerError) and self._has_started:  # then the installation is in order
                raise Outage(str(error).partition(";")[0], remedy=_START_REMEDY) from error
            raise
        else:
            self._note_start(worker)
            if worker.growth_bytes > MOST_GROWTH_BYTES:
                self._end(worker)
                worker = None
        finally:
            self._free.put(worker)

    def _note_start(self, worker: DecodeProcess | None) -> None:
        self._has_started = self._has_started or (worker is not None and worker.is_ready)

    def _start(self) -> DecodeProcess:
        with self._changing:
            if self._closed:
                raise _stopped()
            try:
                worker = self._starter.submit(DecodeProcess, self._options).result()
            except (OSError, RuntimeError) as error:  # RuntimeError: no thread either
                raise _cannot_start(error) from error
            self._all.add(worker)
            return worker

    def _end(self, worker: DecodeProcess | None) -> None:
        with self._changing:
            if worker is not None:
                worker.kill()
                self._all.discard(worker)

    def close(self) -> None:
        """End all processes, also those at work."""
        with self._changing:
            self._closed = True
            while self._all:
                self._all.pop().kill()
        self._starter.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stopped() -> Outage:
    return Outage("decoding was stopped", remedy="run the same command again")


def _cannot_start(error: OSError | RuntimeError) -> Outage:
    if not isinstance(error, OSError):
        error = BlockingIOError(errno.EAGAIN, f"{error}{said_of_memory()}")
    return Outage.of("a process that decodes cannot be started", error, remedy=_START_REMEDY)


def _nbytes(event: FrameEvent) -> int:
    return 0 if isinstance(event, ClipHeader) else event.nbytes
