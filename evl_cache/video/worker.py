"""The process that decodes for `decoding.pool`: one clip at a time, killed when it takes too long.

It talks over a socket, a JSON object a line, and gives frames in a file that both processes have open. It imports neither
torch (but for torchcodec) nor anything of the cache, so that it starts at once and stays small. Its lines:

    says     {"ready"}, once
    request  {"path", "decoder", "tolerate_bad_frames", "device"}
    asks     {"asks"}: which frames of a file of so many -> {"indices"} or {"error"}; may ask again
    gives    {"indices", "count", "size", "decoder"}: a header; what was given before does not count
             {"frames"}: so many lie in the file -> {"taken"}, and only then are the next written; again and again
    ends     {"growth_bytes"} of resident memory since the first clip, and {"error"} where it failed
"""

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
from evl_cache.errors import ClipError, EvlCacheError

_MOST_ADDRESS_SPACE = 16 << 30  # a header that lies about its size must not take the machine's memory
_PR_SET_PDEATHSIG = 1
_GROWTH_TO_TRIM = 32 << 20  # bytes after which free memory between what is used goes back to the system


def main(socket_fd: int, frames_fd: int, parent: int, decoder: str) -> None:
    """Serve requests until the socket is closed."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))  # frames lie in memory, and are bounded
    if decoder == "torchcodec":
        importlib.import_module("torchcodec.decoders")  # brings torch, which must come before the others
    else:  # a GPU's driver takes address space without end
        limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESS_SPACE, limit))
        video.own_stderr()
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
            connection.say({**ended, "growth_bytes": resident - after_first})


class _Connection:
    """The two ways of speaking: lines, and frames in a file."""

    def __init__(self, lines: Any, frames_fd: int) -> None:
        self._lines, self._frames_fd = lines, frames_fd
        self._is_given = False  # frames that were not yet taken

    def say(self, message: dict[str, Any]) -> None:
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def ask(self, count: int) -> np.ndarray:
        """Which frames of a file of so many. Raises: ClipError where none will do."""
        self.wait_until_taken()
        self.say({"asks": count})
        reply = json.loads(self._lines.readline())
        if "error" in reply:
            raise ClipError(reply["error"])
        return np.asarray(reply["indices"], dtype=np.int64)

    def give(self, event: video.FrameEvent) -> None:
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
        view = np.ascontiguousarray(event).data.cast("B")
        written = 0
        while written < len(view):
            written += os.pwrite(self._frames_fd, view[written:], written)
        self.say({"frames": len(event)})
        self._is_given = True

    def wait_until_taken(self) -> None:
        """The other side copies while this one decodes on."""
        if self._is_given:
            self._is_given = False
            self._lines.readline()


def _serve(request: dict[str, Any], connection: _Connection) -> dict[str, str]:
    """Decode one clip. Returns: the error, if any."""
    path = os.fsdecode(bytes.fromhex(request.pop("path")))
    try:
        for event in video.decode_frames(path, connection.ask, options=video.DecodeOptions(**request)):
            connection.give(event)
    except EvlCacheError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"{path}: needs more memory than a decoder may take"}
    return {}


def _trim() -> None:
    """Clips of many sizes and codecs leave gaps, which glibc keeps."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _die_with(parent: int) -> None:
    """Leave no process behind, not even one that hangs in a decoder when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
