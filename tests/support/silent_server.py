"""A server that serves a directory, and for some requests accepts and says nothing more, from the first or from mid-body."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Literal

from tests.support.servers import answering

Silence = Literal["whole", "from mid-body"]


@dataclass
class SilentServer:
    """Serves a directory over HTTP with ranges.

    Attributes:
        silence: how it is silent on a path; None where it answers. May be changed while it runs.
        is_waited_for: set when it has been silent to someone.
        asked: paths so far.
    """

    root: Path
    silence: Callable[[str], Silence | None] = lambda path: None
    is_waited_for: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def silent_server(root: Path, silence: Callable[[str], Silence | None]) -> Iterator[SilentServer]:
    """Start one; connections that wait are dropped at its end."""
    state, is_over = SilentServer(root=root, silence=silence), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # an answer in pieces waits for the acknowledgement of the first

        def do_GET(self) -> None:
            state.asked.append(self.path)
            how = state.silence(self.path)
            if how == "whole":
                self.be_silent()
                return
            path = state.root / self.path.lstrip("/")
            if how and not path.is_file():
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(bytes(500))
                self.be_silent()
                return
            if not path.is_file():
                self.send_error(404)
                return
            body, size = path.read_bytes(), path.stat().st_size
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or size - 1) + 1, size)
                body = body[start:stop]
                self.send_response(206 if body else 416)
                self.send_header(
                    "Content-Range", f"bytes {start}-{stop - 1}/{size}" if body else f"bytes */{size}"
                )
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Mon, 02 Jan 2023 00:00:00 GMT")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[: len(body) // 2] if how else body)
            if how:
                self.be_silent()

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        def be_silent(self) -> None:
            self.wfile.flush()
            state.is_waited_for.set()
            is_over.wait()
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with answering(Handler, at_the_end=is_over.set) as state.url:
        yield state
