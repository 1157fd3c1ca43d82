"""Decoding in processes of their own, which may crash, hang or leak: it costs a clip and not the run.

T frames asked for, H and W source pixels.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from evl_cache.errors import ClipError, WorkerError
from evl_cache.video import Choose, DecodedClip, DecodeOptions

DEFAULT_TIMEOUT_S = 120.0
WORKER = "evl_cache.decode_worker"
_SOCKET_BUFFER = 1 << 20
_START_TIMEOUT_S = 120.0
_MOST_GROWTH = 1 << 30  # bytes that a worker may grow before another takes its place
# sys.path is handed on: a worker must find the same packages, however this process came to them.
_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2])"
)
_START += ".main(*map(int, sys.argv[3:]))"


class DecodePool:
    """Worker processes that decode. A context manager: leaving it ends them.

    `decode` may be called from several threads; each waits for a free worker.

    Args:
        workers: processes. options: see `video`. timeout_s: of one clip; then its worker is killed.
    """

    def __init__(
        self, workers: int, *, options: DecodeOptions | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self._options, self._timeout_s = options or DecodeOptions(), timeout_s
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._closed = False
        for _ in range(workers):
            self._free.put(self._new_worker())

    def decode(self, path: str | Path, choose: Choose) -> DecodedClip:
        """As `video.decode_clip`, in a worker.

        Raises: ClipError also where the worker crashes or takes too long. With `auto` decord only costs itself: PyAV
            is tried then, with the same time.
        """
        try:
            return self._decode(path, choose, self._options.decoder)
        except _WorkerLost as lost:
            if self._options.decoder != "auto":
                raise ClipError(f"{path}: {lost}") from lost
            reason = str(lost)
        try:
            return self._decode(path, choose, "pyav")
        except (_WorkerLost, ClipError) as error:
            told = str(error).removeprefix(f"{path}: ")
            raise ClipError(f"{path}: {reason}; PyAV: {told}") from error

    def _decode(self, path: str | Path, choose: Choose, decoder: str) -> DecodedClip:
        worker = self._free.get()
        try:
            clip = worker.decode(path, choose, decoder, self._options.tolerate_bad_frames, self._timeout_s)
        except BaseException as error:
            if not isinstance(error, ClipError) or isinstance(error, _WorkerLost):
                worker = self._replace(worker)
            raise
        else:
            if worker.growth_bytes > _MOST_GROWTH:
                worker = self._replace(worker)
            return clip
        finally:
            self._free.put(worker)

    def _new_worker(self) -> "_Worker":
        worker = _Worker()
        self._all.add(worker)
        return worker

    def _replace(self, worker: "_Worker") -> "_Worker":
        worker.kill()
        self._all.discard(worker)
        return worker if self._closed else self._new_worker()

    def close(self) -> None:
        """End the workers, also those at work."""
        self._closed = True
        while self._all:
            self._all.pop().kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _WorkerLost(Exception):
    """The worker died or was killed; the message says why."""


class _Worker:
    """One process, and the socket it is spoken to by."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        command = [sys.executable, "-c", _START, json.dumps(sys.path), WORKER]
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        finally:
            theirs.close()
        self._is_ready = False
        self._unread = b""
        self._first_rss: int | None = None
        self.growth_bytes = 0

    def decode(
        self, path: str | Path, choose: Choose, decoder: str, tolerate_bad_frames: bool, timeout_s: float
    ) -> DecodedClip:
        """Raises: ClipError for a clip that cannot be decoded; _WorkerLost where it cost the worker."""
        self._wait_until_ready()
        deadline = time.monotonic() + timeout_s
        self._send(
            {
                "path": os.fsencode(path).hex(),  # names need not be UTF-8
                "decoder": decoder,
                "tolerate_bad_frames": tolerate_bad_frames,
            }
        )
        while True:
            reply = self._receive(deadline, timeout_s)
            if "rss_bytes" in reply:
                break
            self._send(self._choice(choose, int(reply["count"])))
        self._first_rss = self._first_rss or reply["rss_bytes"]
        self.growth_bytes = reply["rss_bytes"] - self._first_rss
        if "error" in reply:
            raise ClipError(reply["error"])
        return DecodedClip(
            frames=self._receive_frames(tuple(reply["shape"]), deadline, timeout_s),
            positions=np.asarray(reply["positions"], np.int64),
            indices=np.asarray(reply["indices"], np.int64),
            num_frames_in_file=reply["count"],
            decoder=reply["decoder"],
        )

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        try:
            self._receive(time.monotonic() + _START_TIMEOUT_S, _START_TIMEOUT_S)
        except _WorkerLost as error:  # no clip's fault
            raise WorkerError(
                f"the process that decodes cannot start ({self._cause_of_death()}; what it said is above); "
                "check that decord or av can be imported by this Python"
            ) from error
        self._is_ready = True

    @staticmethod
    def _choice(choose: Choose, count: int) -> dict[str, Any]:
        try:
            return {"indices": choose(count).tolist()}
        except ClipError as error:
            return {"error": str(error)}

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _WorkerLost(self._cause_of_death()) from error

    def _receive(self, deadline: float, timeout_s: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            more = bytearray(1 << 16)
            self._unread += more[: self._receive_into(memoryview(more), deadline, timeout_s)]
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _receive_frames(self, shape: tuple[int, ...], deadline: float, timeout_s: float) -> np.ndarray:
        frames = np.empty(shape, np.uint8)
        view = frames.data.cast("B")
        got = len(self._unread)
        view[:got] = self._unread
        self._unread = b""
        while got < len(view):
            got += self._receive_into(view[got:], deadline, timeout_s)
        return frames

    def _receive_into(self, buffer: memoryview, deadline: float, timeout_s: float) -> int:
        """Bytes received, at least one. Raises: _WorkerLost where none come in time, or ever."""
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(left)
            count = self._channel.recv_into(buffer)
        except TimeoutError as error:
            raise _WorkerLost(f"decoding took longer than {timeout_s:g} s and was stopped") from error
        except OSError as error:
            raise _WorkerLost(self._cause_of_death()) from error
        if not count:
            raise _WorkerLost(self._cause_of_death())
        return count

    def _cause_of_death(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder's process stopped answering"
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"the decoder crashed ({name})"

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
