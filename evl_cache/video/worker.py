"""The process that decodes for `video.pool`: one clip at a time, and killed when it takes too long.

Its messages are JSON objects, one a line, over a socket; its frames go through a file that both processes have open. It
imports torch for torchcodec only, and nothing of the cache, so that it starts fast and stays small. The messages:

    worker   {"ready"}, once, when it has started
    parent   {"path", "folder", "decoder", "tolerate_bad_frames", "device"}: a clip to decode; a relative path is
             relative to the folder; with {"by_time"} where the choice has to know when frames are shown
    worker   {"asks"}: the number of frames in the file; by time, their seconds are in the file of frames, float64
    parent   {"indices"} of the frames wanted, or {"error"}; it may be asked again, with another number
    worker   {"indices", "count", "size", "decoder"}: a header; frames before it must be dropped
    worker   {"frames"}: so many frames are in the file
    parent   {"taken"}: the next frames may be written
    parent   {"path", "folder", "doubt"}: a clip to judge, and the decoder that served it once
    parent   {"path", "folder", "length"}: a clip whose header is asked how long it is
    worker   {"growth_bytes"} of resident memory since the first clip, and {"error"} if the clip failed, or {"outage",
             "remedy"} where it is not to blame, or what is {"doubtful"} about a clip to judge, or its {"length"}: it is
             finished
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache import video
from evl_cache.errors import ClipError, EvlCacheError, Outage
from evl_cache.video.native_messages import own_stderr
from evl_cache.video.user_limits import limit_address_space, refused, said_of_memory

_PR_SET_PDEATHSIG = 1
_MOST_SAID_BYTES = 1 << 20  # of stderr, during a clip
_GROWTH_TO_TRIM = 32 << 20  # bytes of growth after which glibc's free memory is returned to the system


def main(socket_fd: int, frames_fd: int, parent: int, decoder: str) -> None:
    """Serve requests until the socket is closed."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (largest, largest)
    )  # the file of frames is in memory and bounded; a user's limit on files must not stop it
    if decoder == "torchcodec":
        importlib.import_module(
            "torchcodec.decoders"
        )  # imports torch, which must come before the other decoders
    else:  # not with torchcodec, as a GPU's driver takes any amount of address space
        limit_address_space()
    if decoder == "decord":
        own_stderr()
    with socket.socket(fileno=socket_fd) as channel, channel.makefile("rw", encoding="utf-8") as lines:
        connection = _Connection(lines, frames_fd)
        connection.say({"ready": True})
        after_first: int | None = None
        for line in lines:
            ended = _serve(json.loads(line), connection)
            connection.wait_until_taken()
            resident = _resident_bytes()
            after_first = after_first or resident
            if resident > after_first + _GROWTH_TO_TRIM:
                _trim()
                resident = _resident_bytes()
            _forget_said(0)
            connection.say({**ended, "growth_bytes": resident - after_first})


class _Refused(ClipError):
    """The parent wants no frame, and said why."""


class _Connection:
    """The parent's end: messages by lines, frames by a file."""

    def __init__(self, lines: Any, frames_fd: int) -> None:
        self._lines, self._frames_fd = lines, frames_fd
        self._is_given = False  # whether frames in the file were not yet taken

    def say(self, message: dict[str, Any]) -> None:
        """Send one message."""
        _forget_said(_MOST_SAID_BYTES)
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def ask_by_time(self, shown: video.Shown) -> np.ndarray:
        """Return the frames that the parent wants, by the times that it finds in the file. Raises: as `ask`."""
        self.wait_until_taken()
        self._write(shown.seconds)
        return self.ask(shown.count)

    def ask(self, count: int) -> np.ndarray:
        """Return the frames that the parent wants of `count`, int64 (views, T). Raises: ClipError with its reason."""
        self.wait_until_taken()
        self.say({"asks": count})
        reply = json.loads(self._lines.readline())
        if "error" in reply:
            raise _Refused(reply["error"])
        return np.asarray(reply["indices"], dtype=np.int64)

    def give(self, event: video.FrameEvent) -> None:
        """Send a header or a piece of frames."""
        self.wait_until_taken()
        if isinstance(event, video.ClipHeader):
            self.say(
                {
                    "indices": event.indices.tolist(),
                    "count": event.num_frames_in_file,
                    "size": event.frame_size,
                    "decoder": event.decoder,
                }
            )
            return
        self._write(event)
        self.say({"frames": len(event)})
        self._is_given = True

    def _write(self, array: np.ndarray) -> None:
        view = np.ascontiguousarray(array).data.cast("B")
        written = 0
        while written < len(view):
            written += os.pwrite(self._frames_fd, view[written:], written)

    def wait_until_taken(self) -> None:
        """Wait until the parent has copied the frames in the file: only before the next write, so that both work at once."""
        if self._is_given:
            self._is_given = False
            self._lines.readline()


def _serve(request: dict[str, Any], connection: _Connection) -> dict[str, Any]:
    """Decode or judge one clip, and return what the last message says of it."""
    path, folder = (os.fsdecode(bytes.fromhex(request.pop(name))) for name in ("path", "folder"))
    try:
        _enter(folder)
        if "doubt" in request:
            return {"doubtful": video.doubt(path, request["doubt"])}
        if "length" in request:
            return {"length": video.told_length(path)}
        by_time = request.pop("by_time", False)
        choose = video.ByTime(connection.ask_by_time) if by_time else connection.ask
        for event in video.decode_frames(path, choose, options=video.DecodeOptions(**request)):
            connection.give(event)
    except Outage as outage:
        return {"outage": outage.trouble, "remedy": outage.remedy}
    except (EvlCacheError, OSError, MemoryError, ImportError, RuntimeError) as error:
        return _failure(path, error)
    return {}


def _enter(folder: str) -> None:
    """Make paths relative to a folder, as they are in the parent, which may have changed its own since it began."""
    if folder:
        # Where it was removed, or its name is too long, the process stays where it began.
        with contextlib.suppress(OSError):
            os.chdir(folder)


def _failure(path: str, error: Exception) -> dict[str, str | None]:
    """Return what the last message says of an error. Raises: the error, where no message of ours says it better."""
    if (found := refused(error)) is not None:
        return {"outage": f"{path}: {found[0]}", "remedy": found[1]}
    if isinstance(error, _Refused):  # word for word, as where no process is between
        return {"error": str(error)}
    if isinstance(error, EvlCacheError):
        return {"error": f"{error}{said_of_memory()}"}
    if isinstance(error, MemoryError):
        return {"error": f"{path}: needs more memory than a decoder may take"}
    if isinstance(error, OSError):  # of the file of frames: those of the clip's file are errors of ours
        wanting = Outage.of("decoded frames cannot be passed on", error, remedy="give the run more memory")
        return {"outage": wanting.trouble, "remedy": wanting.remedy}
    raise error


def _forget_said(most_bytes: int) -> None:
    """Empty the file that stderr goes to, where it has more bytes: it is there for the last words of this process."""
    with contextlib.suppress(OSError):
        if os.fstat(2).st_size > most_bytes:
            os.ftruncate(2, 0)


def _trim() -> None:
    """Return the gaps that clips of many sizes and codecs leave, and glibc keeps, to the system."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _die_with(parent: int) -> None:
    """End this process with its parent, even while it hangs in a decoder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
