"""The process that decodes for `decode_pool`: one clip at a time, killed when it takes too long.

It talks over a socket, a JSON object a line. It imports neither torch nor anything of the cache, so that it starts at
once and stays small. Its lines:

    says     {"ready"}, once
    request  {"path", "decoder", "tolerate_bad_frames"}
    asks     {"count"}                      -> {"indices"}: which frames of a file of so many; may ask again
    answers  {"shape", "indices", "positions", "count", "decoder", "rss_bytes"}, then the frames' bytes;
             or {"error", "rss_bytes"}
"""

import ctypes
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


def main(socket_fd: int, parent: int) -> None:
    """Serve requests until the socket is closed."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    video.own_stderr()
    with socket.socket(fileno=socket_fd) as channel, channel.makefile("rw", encoding="utf-8") as lines:
        _send(lines, {"ready": True})
        for line in lines:
            answer, frames = _answer(json.loads(line), lines)
            _send(lines, {**answer, "rss_bytes": _resident_bytes()})
            if frames is not None:
                channel.sendall(frames.data.cast("B"))


def _answer(request: dict[str, Any], lines: Any) -> tuple[dict[str, Any], np.ndarray | None]:
    path = os.fsdecode(bytes.fromhex(request["path"]))

    def choose(count: int) -> np.ndarray:
        _send(lines, {"count": count})
        reply = json.loads(lines.readline())
        if "error" in reply:
            raise ClipError(reply["error"])
        return np.asarray(reply["indices"], dtype=np.int64)

    options = video.DecodeOptions(
        decoder=request["decoder"], tolerate_bad_frames=request["tolerate_bad_frames"]
    )
    try:
        clip = video.decode_clip(path, choose, options=options)
    except EvlCacheError as error:
        return {"error": str(error)}, None
    except MemoryError:
        return {"error": f"{path}: needs more memory than a decoder may take"}, None
    answer = {
        "shape": clip.frames.shape,
        "indices": clip.indices.tolist(),
        "positions": clip.positions.tolist(),
        "count": clip.num_frames_in_file,
        "decoder": clip.decoder,
    }
    return answer, np.ascontiguousarray(clip.frames)


def _send(lines: Any, message: dict[str, Any]) -> None:
    lines.write(json.dumps(message) + "\n")
    lines.flush()


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
