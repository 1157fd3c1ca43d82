"""A stand-in for the process that decodes, forked from one that has loaded the decoders already.

A process that decodes takes 0.3 s of processor time to start, and every extraction starts one; so it is a tenth of that.
`decode_process.WORKER` names this module where conftest.py says so; its processes live, die and complain as those of
`evl_cache.video.worker` do. As a script: the process that forks them.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

# The variable with the socket of that process; without it, decoders start by themselves.
ADDRESS = "EVL_CACHE_TESTS_DECODERS"
NAME = "tests.support.warm_worker"
_LIMITS = ("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NOFILE")
_FIRST_FD = 3  # of what is passed on behind the streams
_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, frames_fd: int, parent: int, decoder: str) -> None:
    """Have a forked process do this one's work, and end as it ends."""
    server = _connected() if decoder != "torchcodec" else None  # that one loads torch
    if server is None:
        from evl_cache.video.worker import main as start

        return start(socket_fd, frames_fd, parent, decoder)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}
    job = {"decoder": decoder, "directory": os.getcwd(), "environment": dict(os.environ), "limits": limits}
    text = json.dumps(job).encode()
    socket.send_fds(server, [len(text).to_bytes(4, "big")], [0, 1, 2, socket_fd, frames_fd])
    server.sendall(text)
    for number in (socket_fd, frames_fd):
        os.close(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = server.makefile()
    answers.readline()  # its process id
    status = int(answers.readline())
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _connected() -> socket.socket | None:
    """To the process that forks; None where there is none."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(os.environ[ADDRESS])
    except (KeyError, OSError):
        server.close()
        return None
    return server


def start() -> str:
    """Start the process that forks; it ends with this one. Return its address."""
    from tests.support.warm_python import start_server

    return str(start_server(__file__, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"))


def use_where_there() -> None:
    """Have extractions of this process decode so, in the children of tests that do."""
    if ADDRESS in os.environ:
        from evl_cache.video import process

        process.WORKER = NAME


def _decode(job: dict[str, Any]) -> None:
    """Decode as `main` would have, in a forked process."""
    from evl_cache.video import worker

    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["directory"])
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limit))
    worker.main(_FIRST_FD, _FIRST_FD + 1, os.getppid(), job["decoder"])


if __name__ == "__main__":
    import av  # noqa: F401

    from evl_cache.video import with_decord, with_pyav, worker  # noqa: F401
    from evl_cache.video.which_decord import load_decord

    with suppress(ImportError):  # it has no wheels for some platforms
        load_decord()
    from tests.support.warm_python import Server, end_with

    server = Server(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if (job := server.next_job()) is not None:
        end_with(lambda: _decode(job))
