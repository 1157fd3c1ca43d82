"""One process that decodes, the socket for its messages, and the file in memory for its frames.

The messages are listed in `video.worker`.

T frames asked for, H and W source pixels.
"""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import ClipError, Outage, WorkerError
from evl_cache.standstill import TimeLimit
from evl_cache.video import ByTime, Choose, ClipHeader, DecodeOptions, FrameEvent, Length, chosen
from evl_cache.video.user_limits import raise_limit, said_of_memory

WORKER = "evl_cache.video.worker"
_START_TIMEOUT_S = 120.0
_STEP_S = 1.0  # of a wait
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# By default glibc returns the memory of each clip's frames to the system, which clears it again: 5 ms a clip.
_KEEPS_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(16 << 20)}
# sys.path is passed on, so that a worker finds the same packages as this process.
_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2])"
)
_START += ".main(*map(int, sys.argv[3:6]), sys.argv[6])"
# By these a process ends itself; others come from outside, such as SIGKILL where the system is out of memory.
_CRASHES = frozenset(
    {
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    }
)
# What FFmpeg tells of a file, with an address that is another each time: no last words.
_OF_FFMPEG = re.compile(r"\[[^]]* @ [^]]*\]|.*deprecated pixel format")
_VARIES = re.compile(r"^\[\d\d:\d\d:\d\d\] |0x[0-9a-f]+")  # a record must not depend on it
_END_BYTES, _MOST_SAID = 1 << 14, 200  # of its stderr that is read, and characters of it in a message
_ENDED = "use fewer --decode-workers, or give the run more memory; move the file away if it alone is at fault"


class WorkerLost(Exception):
    """The process died or was too slow, and must be killed; the message says why."""


class DecodeProcess:
    """A process that decodes one clip at a time. Call `kill` at the end.

    Args:
        options: for every clip.

    Attributes:
        growth_bytes: bytes by which its resident memory has grown since its first clip.
        is_ready: whether it has started.

    Raises: OSError where the system has no process, descriptor or memory left.
    """

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._channel, theirs = socket.socketpair()
        self._frames_fd = self._said_fd = -1
        command = [sys.executable, "-c", _START, json.dumps(sys.path), WORKER]
        try:
            self._frames_fd = _file_in_memory()
            self._said_fd = _file_in_memory()
            fcntl.fcntl(self._said_fd, fcntl.F_SETFL, os.O_APPEND)  # so that it may be emptied meanwhile
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self._frames_fd), str(os.getpid()), options.decoder],
                pass_fds=(theirs.fileno(), self._frames_fd),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said_fd,  # decoders talk much, and a terminal is ours
                env=_KEEPS_MEMORY | os.environ | _ONE_THREAD,
            )
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
        self.is_ready = self._is_killed = False
        self._unread = b""
        self.growth_bytes = 0

    def frames(self, path: str | Path, choose: Choose, timeout_s: float) -> Iterator[FrameEvent]:
        """Yield what `video.decode_frames` yields; the caller's own time does not count towards the timeout.

        Raises: ClipError for a clip that cannot be decoded; WorkerLost where the process died or was too slow;
            WorkerError where the process cannot start; Outage where no clip is to blame, as where it
            was killed by another than us.
        """
        self._wait_until_ready()
        limit = TimeLimit(timeout_s)
        self._send(
            {
                **_file(path),
                "decoder": self._options.decoder,
                "tolerate_bad_frames": self._options.tolerate_bad_frames,
                "device": self._options.device,
                **({"by_time": True} if isinstance(choose, ByTime) else {}),
            },
            limit,
        )
        size = (0, 0)
        while "growth_bytes" not in (said := self._receive(limit)):
            if "asks" in said:
                self._send(self._choice(choose, int(said["asks"])), limit)
                continue
            event: FrameEvent
            if "indices" in said:
                event = _header(said)
                size = event.frame_size
            else:
                event = self._take_frames((said["frames"], *size, 3), limit)
            with limit.suspended():
                yield event
        self._finish(said)

    def doubt(self, path: str | Path, decoder: str, timeout_s: float) -> str | None:
        """Return what `video.doubt` returns. Raises: as `frames`."""
        self._wait_until_ready()
        limit = TimeLimit(timeout_s)
        self._send({**_file(path), "doubt": decoder}, limit)
        said = self._receive(limit)
        self._finish(said)
        found: str | None = said["doubtful"]
        return found

    def length(self, path: str | Path, timeout_s: float) -> Length:
        """Return what `video.told_length` returns. Raises: as `frames`."""
        self._wait_until_ready()
        limit = TimeLimit(timeout_s)
        self._send({**_file(path), "length": True}, limit)
        said = self._receive(limit)
        self._finish(said)
        return Length(*said["length"])

    def _finish(self, said: dict[str, Any]) -> None:
        """Take the last message of a request. Raises: ClipError, Outage where it tells of one."""
        self.growth_bytes = said["growth_bytes"]
        if "outage" in said:
            raise Outage(said["outage"], remedy=said["remedy"])
        if "error" in said:
            raise ClipError(said["error"])

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._is_killed = True
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._channel.close()
        open_fds = {self._frames_fd, self._said_fd} - {-1}
        self._frames_fd = self._said_fd = -1
        for descriptor in open_fds:
            os.close(descriptor)

    def _wait_until_ready(self) -> None:
        if self.is_ready:
            return
        try:
            self._receive(TimeLimit(_START_TIMEOUT_S))
        except WorkerLost as error:  # no clip's fault
            reason = WorkerError(
                f"the process that decodes cannot start ({self._cause_of_death()}); "
                f"check that av, and decord where it is used, can be imported by this Python{raise_limit()}"
            )
            reason.add_note(self._said())  # a traceback of the process, beside that of this one
            raise reason from error
        self.is_ready = True

    def _send(self, message: dict[str, Any], limit: TimeLimit) -> None:
        try:
            self._channel.settimeout(max(limit.left_s, _STEP_S))
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._loss() from error

    def _receive(self, limit: TimeLimit) -> dict[str, Any]:
        while b"\n" not in self._unread:
            more = bytearray(1 << 16)
            self._unread += more[: self._receive_into(memoryview(more), limit)]
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _take_frames(self, shape: tuple[int, ...], limit: TimeLimit) -> np.ndarray:
        """Return a copy of the frames in the file, and let the process write the next ones."""
        frames = self._read(np.empty(shape, np.uint8))
        self._send({"taken": True}, limit)
        return frames

    def _choice(self, choose: Choose, count: int) -> dict[str, Any]:
        try:
            indices = chosen(choose, count, lambda: self._read(np.empty(count, np.float64)))
            return {"indices": indices.tolist()}
        except ClipError as error:
            return {"error": str(error)}

    def _read(self, array: np.ndarray) -> np.ndarray:
        """Fill an array with what is in the file, and return it. Raises: WorkerLost where that is less."""
        view = array.data.cast("B")
        got = 0
        while got < len(view):
            count = os.preadv(self._frames_fd, [view[got:]], got)
            if not count:
                raise WorkerLost("the decoder's process gave fewer frames than it said")
            got += count
        return array

    def _receive_into(self, buffer: memoryview, limit: TimeLimit) -> int:
        """Return the number of bytes received, at least one. Raises: WorkerLost where none come in time."""
        limit.look(_STEP_S)  # frames were copied, or chosen
        while (left_s := limit.left_s) > 0:
            try:
                self._channel.settimeout(min(left_s, _STEP_S))
                count = self._channel.recv_into(buffer)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._loss() from error
            finally:
                limit.look(_STEP_S)
            if not count:
                raise self._loss()
            return count
        raise WorkerLost(f"decoding took longer than {limit.seconds:g} s (--clip-timeout) and was stopped")

    def _loss(self) -> WorkerLost | Outage:
        """Return the error that tells how the process ended."""
        cause = self._cause_of_death()
        status = self._process.returncode
        if self._is_killed or status is None or status >= 0 or -status in _CRASHES:
            return WorkerLost(cause)
        return Outage(
            f"a process that decodes was ended from outside ({_how_ended(status)}), as for want of memory",
            remedy=_ENDED,
        )

    def _cause_of_death(self) -> str:
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder's process stopped answering"
        lines = [line for line in self._said().splitlines() if line.strip() and not _OF_FFMPEG.match(line)]
        last = f": {_VARIES.sub('', lines[-1]).strip()[:_MOST_SAID]}" if lines else ""
        return f"the decoder crashed ({_how_ended(status)}{last}{said_of_memory()})"

    def _said(self) -> str:
        """Return the end of what the process, and the libraries in it, wrote to stderr."""
        with suppress(OSError):  # another thread closed it
            size = os.fstat(self._said_fd).st_size
            return os.pread(self._said_fd, _END_BYTES, max(0, size - _END_BYTES)).decode(errors="replace")
        return ""


def _how_ended(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"


def _file_in_memory() -> int:
    """Return the descriptor of a nameless file in memory, for frames or for what a process says.

    Frames over a socket would take two more copies, and a switch between processes every 200 KB.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("evl-cache-frames")
    descriptor, name = tempfile.mkstemp(prefix="evl-cache-frames-")
    os.unlink(name)
    return descriptor


def _file(path: str | Path) -> dict[str, str]:
    """Return what tells a process of a file; names need not be UTF-8."""
    folder = ""
    if not os.path.isabs(path):
        with suppress(OSError):  # it was removed
            folder = os.getcwd()
    return {"path": os.fsencode(path).hex(), "folder": os.fsencode(folder).hex()}


def _header(said: dict[str, Any]) -> ClipHeader:
    height, width = said["size"]
    return ClipHeader(
        indices=np.asarray(said["indices"], np.int64),
        num_frames_in_file=said["count"],
        frame_size=(height, width),
        decoder=said["decoder"],
    )
