"""Decoding in processes of their own, which may crash, hang or leak: it costs a clip and not the run.

T frames asked for, H and W source pixels.
"""

import json
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.video import Choose, DecodedClip, DecodeOptions

DEFAULT_TIMEOUT_S = 120.0
WORKER = "evl_cache.decode_worker"
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
    """One process, with the socket it is spoken to by and the memory it lays frames into."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._memory = tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)  # noqa: SIM115
        fds = (theirs.fileno(), self._memory.fileno())
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _START,
                    json.dumps(sys.path),
                    WORKER,
                    *map(str, fds),
                    str(os.getpid()),
                ],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        finally:
            theirs.close()
        self._unread = b""
        self._first_rss: int | None = None
        self.growth_bytes = 0

    def decode(
        self, path: str | Path, choose: Choose, decoder: str, tolerate_bad_frames: bool, timeout_s: float
    ) -> DecodedClip:
        """Raises: ClipError for a clip that cannot be decoded; _WorkerLost where it cost the worker."""
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
        shape = tuple(reply["shape"])
        size = int(np.prod(shape))
        with mmap.mmap(self._memory.fileno(), max(1, size), access=mmap.ACCESS_READ) as memory:
            frames = np.frombuffer(memory[:size], np.uint8).reshape(shape)
        return DecodedClip(
            frames=frames,
            positions=np.asarray(reply["positions"], np.int64),
            indices=np.asarray(reply["indices"], np.int64),
            num_frames_in_file=reply["count"],
            decoder=reply["decoder"],
        )

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
            left = deadline - time.monotonic()
            try:
                self._channel.settimeout(max(left, 1e-3))
                more = self._channel.recv(1 << 16) if left > 0 else None
            except TimeoutError:
                more = None
            except OSError:
                more = b""
            if more is None:
                raise _WorkerLost(f"decoding took longer than {timeout_s:g} s and was stopped")
            if not more:
                raise _WorkerLost(self._cause_of_death())
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _cause_of_death(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder's process stopped answering"
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"the decoder crashed ({name})"

    def kill(self) -> None:
        """End the process, whatever it does, and give its memory back."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
        self._memory.close()
