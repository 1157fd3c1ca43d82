"""One process that decodes, the socket it is spoken to by, and the file in memory by which frames come.

What is said is in `decoding.worker`.

T frames asked for, H and W source pixels.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import ClipError, WorkerError
from evl_cache.video import Choose, ClipHeader, DecodeOptions, FrameEvent

WORKER = "evl_cache.video.worker"
_START_TIMEOUT_S = 120.0
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# glibc gives the pictures of each clip back to the system, which clears them anew for the next: 5 ms of a clip.
_KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(16 << 20)}
# sys.path is handed on: a worker must find the same packages, however this process came to them.
_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2])"
)
_START += ".main(*map(int, sys.argv[3:6]), sys.argv[6])"


class WorkerLost(Exception):
    """The process died or was too slow, and has to be killed; the message says why."""


class DecodeProcess:
    """Decodes one clip at a time. `kill` it in the end.

    Args:
        options: of every clip; the decoder may be another for one.

    Attributes:
        growth_bytes: by how much its resident memory has grown since its first clip.
    """

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._channel, theirs = socket.socketpair()
        self._frames_fd = _file_in_memory()
        command = [sys.executable, "-c", _START, json.dumps(sys.path), WORKER]
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self._frames_fd), str(os.getpid()), options.decoder],
                pass_fds=(theirs.fileno(), self._frames_fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_KEEPS_MEMORY | os.environ | _ONE_THREAD,
            )
        finally:
            theirs.close()
        self._is_ready = False
        self._unread = b""
        self.growth_bytes = 0

    def frames(
        self, path: str | Path, choose: Choose, decoder: str, timeout_s: float
    ) -> Iterator[FrameEvent]:
        """As `video.decode_frames`. The time that the caller takes over what it is given does not count.

        Raises: ClipError for a clip that cannot be decoded; WorkerLost where it cost the process; WorkerError where
            the process cannot even start.
        """
        self._wait_until_ready()
        deadline = time.monotonic() + timeout_s
        self._send(
            {
                "path": os.fsencode(path).hex(),  # names need not be UTF-8
                "decoder": decoder,
                "tolerate_bad_frames": self._options.tolerate_bad_frames,
                "device": self._options.device,
            }
        )
        size = (0, 0)
        while "growth_bytes" not in (said := self._receive(deadline, timeout_s)):
            if "asks" in said:
                self._send(_choice(choose, int(said["asks"])))
                continue
            event: FrameEvent
            if "indices" in said:
                event = _header(said)
                size = event.frame_size
            else:
                event = self._take_frames((said["frames"], *size, 3))
            given = time.monotonic()
            yield event
            deadline += time.monotonic() - given
        self.growth_bytes = said["growth_bytes"]
        if "error" in said:
            raise ClipError(said["error"])

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
        if self._frames_fd >= 0:
            os.close(self._frames_fd)
            self._frames_fd = -1

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        try:
            self._receive(time.monotonic() + _START_TIMEOUT_S, _START_TIMEOUT_S)
        except WorkerLost as error:  # no clip's fault
            raise WorkerError(
                f"the process that decodes cannot start ({self._cause_of_death()}; what it said is above); "
                "check that av, and decord where it is used, can be imported by this Python"
            ) from error
        self._is_ready = True

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise WorkerLost(self._cause_of_death()) from error

    def _receive(self, deadline: float, timeout_s: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            more = bytearray(1 << 16)
            self._unread += more[: self._receive_into(memoryview(more), deadline, timeout_s)]
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _take_frames(self, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of what lies in the file, in which the process may write again then."""
        frames = np.empty(shape, np.uint8)
        view = frames.data.cast("B")
        got = 0
        while got < len(view):
            count = os.preadv(self._frames_fd, [view[got:]], got)
            if not count:
                raise WorkerLost("the decoder's process gave fewer frames than it said")
            got += count
        self._send({"taken": True})
        return frames

    def _receive_into(self, buffer: memoryview, deadline: float, timeout_s: float) -> int:
        """Bytes received, at least one. Raises: WorkerLost where none come in time, or ever."""
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(left)
            count = self._channel.recv_into(buffer)
        except TimeoutError as error:
            raise WorkerLost(f"decoding took longer than {timeout_s:g} s and was stopped") from error
        except OSError as error:
            raise WorkerLost(self._cause_of_death()) from error
        if not count:
            raise WorkerLost(self._cause_of_death())
        return count

    def _cause_of_death(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder's process stopped answering"
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"the decoder crashed ({name})"


def _file_in_memory() -> int:
    """A descriptor of a file without a name: a socket would cost two copies more, and a switch of processes every 200 KB."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("evl-cache-frames")
    descriptor, name = tempfile.mkstemp(prefix="evl-cache-frames-")
    os.unlink(name)
    return descriptor


def _choice(choose: Choose, count: int) -> dict[str, Any]:
    try:
        return {"indices": choose(count).tolist()}
    except ClipError as error:
        return {"error": str(error)}


def _header(said: dict[str, Any]) -> ClipHeader:
    height, width = said["size"]
    return ClipHeader(
        indices=np.asarray(said["indices"], np.int64),
        num_frames_in_file=said["count"],
        frame_size=(height, width),
        decoder=said["decoder"],
    )
