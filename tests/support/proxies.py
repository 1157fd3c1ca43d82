"""A real little HTTP proxy on loopback: it tunnels (CONNECT) and passes plain requests on, and records what it is sent."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.support.bad_answers import Answer, Request
from tests.support.bad_servers import passed_on, read_request
from tests.support.credentials import basic
from tests.support.recorded import recorded


@dataclass
class Proxy:
    """A running proxy. `targets`: what it was asked for. `login`: without which it answers 407."""

    address: str
    login: tuple[str, str] | None
    targets: list[str] = field(default_factory=list)

    def url(self, *, with_login: bool = True) -> str:
        user = f"{':'.join(self.login)}@" if self.login and with_login else ""
        return f"http://{user}{self.address}"


@contextlib.contextmanager
def http_proxy(*, login: tuple[str, str] | None = None, passes_on: tuple[str, ...] = ()) -> Iterator[Proxy]:
    """Start one. login: user and password that are given for it. passes_on: credentials of plain servers behind it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        recorded("proxy", given=[*passes_on, *([login[1]] if login else [])]) as record,
    ):
        proxy = Proxy(f"127.0.0.1:{listener.getsockname()[1]}", login)

        def accept() -> None:
            with contextlib.suppress(OSError):  # shut
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        def serve(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection, connection.makefile("rb") as incoming:
                while (request := read_request(incoming)) is not None:
                    record.requests.append(request.head)
                    proxy.targets.append(request.path)
                    if login and request.headers.get("proxy-authorization") != f"Basic {basic(*login)}":
                        refusal = Answer(status=407, headers={"Proxy-Authenticate": 'Basic realm="proxy"'})
                        connection.sendall(refusal.head())
                    elif request.method == "CONNECT":
                        _tunnel(connection, request.path)
                        return
                    else:
                        connection.sendall(b"".join(map(bytes, _forward(request).steps())))  # type: ignore[arg-type]

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield proxy
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def _forward(request: Request) -> Answer:
    parts = urlsplit(request.path)
    headers = {name: value for name, value in request.headers.items() if not name.startswith("proxy-")}
    inner = Request(method=request.method, path=parts.path, headers=headers, head="", body=request.body)
    try:
        return passed_on(f"http://{parts.netloc}", inner)[0]
    except OSError:
        return Answer(status=502)


def _tunnel(connection: socket.socket, target: str) -> None:
    host, _, port = target.rpartition(":")
    try:
        other = socket.create_connection((host.strip("[]"), int(port)), timeout=30)
    except OSError:
        connection.sendall(Answer(status=502).head())
        return
    with other:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with selectors.DefaultSelector() as ready:  # `select` takes no file above the thousandth
            for end, opposite in ((connection, other), (other, connection)):
                ready.register(end, selectors.EVENT_READ, opposite)
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    if not data:
                        return
                    key.data.sendall(data)
