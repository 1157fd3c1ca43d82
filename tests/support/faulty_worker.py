"""A worker whose decoders hang, crash and leak on clips whose names say so; on others it is the real one."""

import errno
import os
import signal
import time

from evl_cache import video
from evl_cache.video import worker as decode_worker

_real = video.decode_frames
_leaked = []


def _is_due(path):
    """Whether to do what the name says: always, or for the first time, of which a file is left as a sign."""
    sign = os.fsdecode(path) + ".sign"
    if " once" not in os.path.basename(path):
        return True
    try:
        os.close(os.open(sign, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _act(path):
    """Do what the clip's name says."""
    name = os.path.basename(os.fsdecode(path))
    if "hangs" in name:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # deaf to everything but a kill
        while True:
            time.sleep(3600)
    if "waits" in name:
        open(os.fsdecode(path) + ".asked", "w").close()
        while not os.path.exists(os.fsdecode(path) + ".answer"):
            time.sleep(0.01)
    if "talks" in name:
        os.write(2, b"[swscaler @ 0x5581] deprecated pixel format used\n" * 100_000)
    if "says why" in name:
        os.write(2, b"corrupted size at 0x5581aa\n[h264 @ 0x5581] a remark\n")
    if "killed" in name and _is_due(path):
        os.kill(os.getpid(), signal.SIGKILL)
    if "aborts" in name:
        os.abort()
    if "no memory" in name:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _decode_frames(path, choose, *, options=None):
    _act(path)
    name = os.path.basename(os.fsdecode(path))
    if "leaks" in name:
        _leaked.append(b"x" * (64 << 20))
    yield from _real(path, choose, options=options)


def _doubt(path, decoder):
    _act(path)
    return f"{path} by {decoder} is doubtful" if "doubtful" in path else None


video.decode_frames = _decode_frames
video.doubt = _doubt
main = decode_worker.main
