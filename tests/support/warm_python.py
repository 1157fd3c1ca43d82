"""A stand-in for the interpreter whose processes are forked from one that has loaded torch and evl_cache already.

A start of Python with torch takes seconds of processor time; by `warm_python()` a fraction of a second. It takes
`-m MODULE`, `-c CODE` or a script, as Python does, with environment, directory, streams, exit status and signals as
a process of its own would have. What a fresh interpreter imports, needs or measures, only `sys.executable` tells.
"""

import atexit
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What the processes of tests load, none of which starts a thread.
_LOADED = (
    "open_clip",
    "torch.distributed.run",
    "evl_cache.caches.pairing",
    "evl_cache.caches.share",
    "evl_cache.extract.stage",
    "evl_cache.towers",
    "evl_cache.train.stage",
    "evl_cache_cli.main",
)
# Waits for the forked process in the place of it: little is imported, so that it starts at once.
_CLIENT = """
import json, os, signal, socket, sys
numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until it is known whom they are for
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = json.dumps(dict(argv=sys.argv[1:], directory=os.getcwd(), environment=dict(os.environ))).encode()
socket.send_fds(server, [len(job).to_bytes(4, "big")], [0, 1, 2])
server.sendall(job)
answers = server.makefile()
pid = int(answers.readline())
def pass_on(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has ended, and its status is on the way
        pass
for number in numbers:
    signal.signal(number, pass_on)
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@cache
def warm_python() -> str:
    """Path of the stand-in; the process behind it starts with the first call, and ends with this one."""
    address = start_server(__file__)
    folder = address.parent
    (folder / "client.py").write_text(_CLIENT.format(address=str(address)))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{folder / "client.py"}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def with_root() -> str:
    """Return PYTHONPATH with this repository before what is there: packages may lie beside the environment's."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_server(script: str, **environment: str) -> Path:
    """Start a process that forks at a socket; it ends with this one.

    Args:
        script: makes a `Server`, whose socket it is told, and prints `ready`.

    Returns: the socket, in a folder of its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="evl-python-"))
    server = subprocess.Popen(
        [sys.executable, script, str(folder / "socket")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": with_root(), "OMP_WAIT_POLICY": "PASSIVE"} | environment,
        cwd=ROOT,
    )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    server.stdout.close()

    def end() -> None:
        server.stdin.close()  # type: ignore[union-attr]
        server.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return folder / "socket"


class Server:
    """Forks a child for each connection, tells its end there, and kills it when the other side is gone."""

    def __init__(self, address: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._children: dict[int, socket.socket] = {}  # by process id
        wakes, self._wakes = socket.socketpair()
        for end in (wakes, self._wakes):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector = selectors.DefaultSelector()
        for source in (self._listener, wakes, sys.stdin):
            self._selector.register(source, selectors.EVENT_READ)
        self._end_of_child = wakes

    def next_job(self) -> dict[str, Any] | None:
        """Serve until stdin ends: None. In a forked child: its job."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self._end_of_child:
                    self._end_of_child.recv(4096)
                    self._tell_ends()
                elif key.fileobj is self._listener:
                    if (job := self._fork()) is not None:
                        return job
                elif key.data in self._children:
                    os.kill(key.data, signal.SIGKILL)
                    self._selector.unregister(key.fileobj)

    def _fork(self) -> dict[str, Any] | None:
        connection, _ = self._listener.accept()
        # Streams: stdin, stdout, stderr, and what else is passed on.
        size, streams, _, _ = socket.recv_fds(connection, 4, 8)
        text = b""
        while len(text) < int.from_bytes(size, "big") and (more := connection.recv(1 << 16)):
            text += more
        if len(streams) < 3 or len(text) < int.from_bytes(size, "big"):  # whoever asked was killed meanwhile
            for held in streams:
                os.close(held)
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._forget()
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            # Python's own know whether the server's could seek.
            sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
            job: dict[str, Any] = json.loads(text)
            return job
        for stream in streams:
            os.close(stream)
        with suppress(OSError):  # it was killed by now: the selector will tell
            connection.sendall(f"{pid}\n".encode())
        self._children[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def _tell_ends(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid)
            if connection.fileno() in self._selector.get_map():
                self._selector.unregister(connection)
            with suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()

    def _forget(self) -> None:
        """In a child: no descriptor and no signal handler of the server is left."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for held in (self._listener, self._end_of_child, self._wakes, *self._children.values()):
            held.close()


def _run(job: dict[str, Any]) -> None:
    """Do what Python does with these arguments."""
    import torch

    from tests.support import warm_worker

    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["directory"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    warm_worker.use_where_there()
    arguments = job["argv"]
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))  # type: ignore[arg-type]
    if arguments[0] in ("-m", "-c"):
        option, what, *rest = arguments
        sys.path.insert(0, os.getcwd() if option == "-m" else "")
        sys.argv = [option, *rest]
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = fresh = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(fresh))
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def end_with(work: Callable[[], None]) -> None:
    """Do the work and end as Python does, but that memory is not taken apart, which would take a second or two."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # threads that are no daemons end first
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)


if __name__ == "__main__":
    for name in (n for n in _LOADED if find_spec(n.partition(".")[0]) is not None):
        importlib.import_module(name)
    server = Server(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if (job := server.next_job()) is not None:
        end_with(lambda: _run(job))
