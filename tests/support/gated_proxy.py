"""A server before another one, which passes on what it is asked, and may hold some requests back for as long as wished."""

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.support.servers import answering


@dataclass
class GatedProxy:
    """`holds(method, path)`: whether a request is held back. `held`: set when one is."""

    holds: Callable[[str, str], bool] = lambda method, path: False
    held: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@contextlib.contextmanager
def gated_proxy(server_url: str) -> Iterator[GatedProxy]:
    """Start one before a server at `http://host:port`. What is held at its end is dropped."""
    state, is_over = GatedProxy(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if state.holds(self.command, self.path):
                state.held.set()
                is_over.wait(120)
                self.close_connection = True
                return
            with contextlib.closing(http.client.HTTPConnection(server_url.removeprefix("http://"))) as behind:
                headers = {key: value for key, value in self.headers.items() if key.lower() != "expect"}
                behind.request(self.command, self.path, body, headers)
                answer = behind.getresponse()
                content = answer.read()
            with contextlib.suppress(ConnectionError):
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(key, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.pass_on()

        def do_HEAD(self) -> None:
            self.pass_on()

        def do_PUT(self) -> None:
            self.pass_on()

        def do_POST(self) -> None:
            self.pass_on()

        def do_DELETE(self) -> None:
            self.pass_on()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with answering(Handler, at_the_end=is_over.set) as state.url:
        yield state
