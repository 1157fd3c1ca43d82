"""HTTP servers that misbehave by seed, on loopback.

Which fault a request meets depends on the seed, and on how often its path was asked for.
"""

import contextlib
import http.client
import io
import random
import re
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from tests.support.bad_answers import CUT, FAULTS, RESTART, SILENCE, Answer, Request, Scene, Step
from tests.support.credentials import basic
from tests.support.recorded import Record, recorded

_MOST_WAITS = 3  # of a passing schedule: each costs the whole of a client's patience
# What a lasting fault befalls.
_PLACES = (
    "",
    "/tokens/",
    "/maps/",
    "/class_tokens/",
    "manifest.json",
    "zarr.json",
    "clips.jsonl",
    "index.bin",
    "/done/",
)


@dataclass(frozen=True)
class Always:
    """One fault befalls every request."""

    lasting: str
    pause_s: float = 0.0
    is_lasting: ClassVar[bool] = True

    def fault(self, path: str, count: int) -> str:
        return self.lasting


@dataclass(frozen=True)
class Schedule:
    """What happens to the requests of a server.

    Args:
        seed: even: the faults pass, at most `most` for each path; odd: one stays for ever.
        pause_s: before every answer.
    """

    seed: int
    most: int = 2
    pause_s: float = 0.0

    @property
    def is_lasting(self) -> bool:
        return self.seed % 2 == 1

    @property
    def lasting(self) -> str:
        return list(FAULTS)[(8 + 5 * (self.seed // 2)) % len(FAULTS)]  # of 28: those beside each other differ

    def fault(self, path: str, count: int) -> str | None:
        """The fault of the request of a path that `count` came before."""
        whole = random.Random(f"{self.seed}")
        if self.is_lasting:
            place, begins = whole.choice(_PLACES), whole.choice((0, 0, 1, 2))
            return self.lasting if place in path and count >= begins else None
        few = whole.sample(list(FAULTS), whole.choice((2, 4, len(FAULTS))))
        rate = whole.choice((0.1, 0.3, 0.6))
        here = random.Random(f"{self.seed} {path} {count}")
        return here.choice(few) if count < self.most and here.random() < rate else None


NOTHING_WRONG = -1
NO_HTTP = "none"  # the method of what is no request


@dataclass
class BadServer:
    """A running server.

    Attributes:
        schedule: may be changed while it runs; None: it behaves.
        login: (user, password) without which it answers 401.
        asked: how often each path was asked for.
        served: the faults shown, as (path, name).
        begun: set with the first request.
    """

    answer: Callable[[Request], tuple[Answer, bytes]]
    schedule: Schedule | Always | None
    record: Record
    login: tuple[str, str] | None = None
    elsewhere: str = ""
    url: str = ""
    asked: dict[str, int] = field(default_factory=dict)
    served: list[tuple[str, str]] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_names(self) -> set[str]:
        with self.lock:
            return {name for _, name in self.served}

    def waits(self) -> int:
        """How many answers kept a client waiting."""
        with self.lock:
            return sum(FAULTS[name].waits for _, name in self.served)

    def steps(self, request: Request) -> "list[Step]":
        """What is done about a request."""
        path = urlsplit(request.path).path
        with self.lock:
            count = self.asked[path] = self.asked.get(path, -1) + 1
            name = None if self.schedule is None else self.schedule.fault(path, count)
            if name is not None and not self.schedule.is_lasting and FAULTS[name].waits:  # type: ignore[union-attr]
                shown = sum(FAULTS[other].waits for _, other in self.served)
                name = name if shown < _MOST_WAITS else None
            if name is not None:
                self.served.append((path, name))
        self.begun.set()
        if self.login is not None and request.headers.get("authorization") != f"Basic {basic(*self.login)}":
            return Answer(status=401, headers={"WWW-Authenticate": 'Basic realm="lab"'}).steps()
        pause_s = 0.0 if self.schedule is None else self.schedule.pause_s
        return [pause_s, *self.answered(request, name, random.Random(f"{path} {count}"))]

    def answered(self, request: Request, fault: str | None, rng: random.Random) -> "list[Step]":
        """The right answer, or what a fault makes of it."""
        right, whole = self.answer(request)
        if fault is None:
            return right.steps()
        scene = Scene(request=request, whole=whole, elsewhere=self.elsewhere, rng=rng)
        return list(FAULTS[fault].act(right, scene))


def file_answer(root: Path, request: Request) -> tuple[Answer, bytes]:
    """The right answer of a server of files, and the whole file."""
    path = root / unquote(urlsplit(request.path).path).lstrip("/")
    if path.is_dir():
        links = "".join(
            f'<a href="{p.name}{"/" * p.is_dir()}">{p.name}</a>\n' for p in sorted(path.iterdir())
        )
        page = links.encode()
        return Answer(status=200, headers={"Content-Type": "text/html"}, body=page), page
    if not path.is_file():
        return Answer(status=404, body=b"not found"), b""
    body = path.read_bytes()
    headers = {"ETag": f'"{len(body):x}-{zlib.crc32(body):x}"', "Content-Type": "application/octet-stream"}
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if found is None:
        return Answer(status=200, headers=headers, body=body), body
    start, stop = int(found[1]), min(int(found[2] or len(body) - 1) + 1, len(body))
    if start >= stop:
        return Answer(status=416, headers={"Content-Range": f"bytes */{len(body)}"}), body
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
    return Answer(status=206, headers=headers, body=body[start:stop]), body


def passed_on(upstream: str, request: Request) -> tuple[Answer, bytes]:
    """The answer of another server, which is sent the same headers (an S3 server's signatures are of these)."""
    connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(request.body or None)
        answer = connection.getresponse()
        body = answer.read()
    left_out = ("content-length", "transfer-encoding", "connection")
    headers = {name.title(): value for name, value in answer.getheaders() if name.lower() not in left_out}
    return Answer(status=answer.status, headers=headers, body=body), body


@contextlib.contextmanager
def misbehaving_server(
    root: Path | str,
    seed: int,
    *,
    login: tuple[str, str] | None = None,
    given: tuple[str, ...] = (),
    elsewhere: str = "",
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> Iterator[BadServer]:
    """Start one.

    Args:
        root: the directory that is served, or the URL of the server that requests are passed on to.
        seed: of its `Schedule`; `NOTHING_WRONG`: it behaves.
        login: user and password that are given for it, and without which it answers 401.
        given: credentials that are given for it otherwise.
        elsewhere: where it redirects to.
        tls: with it, the server speaks TLS. host: that it listens at, and by which its URL names it.
    """
    given = (*given, login[1]) if login else given
    with recorded(f"misbehaving server, seed {seed}", given=given) as record:
        state = BadServer(
            answer=(lambda r: file_answer(root, r))
            if isinstance(root, Path)
            else (lambda r: passed_on(root, r)),
            schedule=None if seed == NOTHING_WRONG else Schedule(seed),
            record=record,
            login=login,
            elsewhere=elsewhere,
        )
        listener = Listener(state, host, tls)
        named = f"[{host}]" if ":" in host else host
        state.url = f"{'https' if tls else 'http'}://{named}:{listener.port}"
        try:
            yield state
        finally:
            listener.close()


class Listener:
    """The sockets of a server: one thread for each connection."""

    def __init__(self, state: BadServer, host: str, tls: ssl.SSLContext | None) -> None:
        self._state, self._host, self._tls, self.port = state, host, tls, 0
        self._lock, self._closing, self._away = threading.Lock(), threading.Event(), threading.Lock()
        self._connections: set[socket.socket] = set()
        self._open()

    def close(self) -> None:
        self._closing.set()
        self._shut()

    def _open(self) -> None:
        self._listener = socket.create_server(
            (self._host, self.port),
            family=socket.AF_INET6 if ":" in self._host else socket.AF_INET,
            backlog=64,
        )
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _shut(self) -> None:
        """End the listener and what is connected: new connections are refused."""
        with self._lock:
            for held in (self._listener, *self._connections):
                with contextlib.suppress(OSError):
                    held.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._connections.clear()

    def restart(self, away_s: float) -> None:
        """Refuse connections for a while."""
        if not self._away.acquire(blocking=False):
            return  # it is away already
        with contextlib.ExitStack() as back:
            back.callback(self._away.release)
            self._shut()
            if not self._closing.wait(away_s):
                self._open()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut
            while True:
                connection, _ = listener.accept()
                with self._lock:
                    self._connections.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                if self._tls is not None:
                    connection = self._tls.wrap_socket(plain, server_side=True)
                incoming = stack.enter_context(connection.makefile("rb"))
                while (request := read_request(incoming)) is not None:
                    if request.method == NO_HTTP:
                        connection.sendall(Answer(status=400, body=b"not HTTP").head())
                        return
                    self._state.record.requests.append(request.head)
                    if not self._answer(connection, request):
                        return
        finally:
            with self._lock:
                self._connections.discard(plain)
            connection.close()
            plain.close()

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        """Whether the connection stays."""
        for step in self._state.steps(request):
            if isinstance(step, bytes):
                if request.method == "HEAD":
                    step = step.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
                connection.sendall(step)
            elif isinstance(step, float):
                if step:
                    self._closing.wait(step)
            elif step == SILENCE:
                connection.settimeout(120)
                connection.recv(1)  # until the client gives up, or the server is shut
                return False
            elif step == CUT:
                return False
            elif step == RESTART:
                threading.Thread(target=self.restart, args=(0.3,), daemon=True).start()
                return False
        return True


def read_request(incoming: io.BufferedReader) -> Request | None:
    """The next request of a connection; None where it has ended."""
    lines: list[str] = []
    if (first := incoming.peek(1)[:1]) and not first.isalpha():  # the greeting of TLS, say
        return Request(method=NO_HTTP, path="", headers={}, head="")
    while (line := incoming.readline(1 << 16)) not in (b"\r\n", b"\n"):
        if not line:
            return None
        lines.append(line.decode("latin-1").rstrip("\r\n"))
    if not lines:
        return None
    method, path, _ = lines[0].split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    body = incoming.read(int(headers.get("content-length", 0)))
    return Request(method=method, path=path, headers=headers, head="\n".join(lines), body=body)
