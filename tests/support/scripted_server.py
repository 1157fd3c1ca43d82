"""A server on loopback that sends what it is told, byte for byte, and notes every request as it came."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class ScriptedServer:
    """The first answer goes to the first request, and so on; the last one is repeated.

    Attributes:
        url: of http.
        answers: whole answers; one with `Connection: close` ends its connection.
        requests: lines and headers.
    """

    url: str
    answers: Sequence[bytes]
    requests: list[bytes] = field(default_factory=list)

    def answer_to(self, head: bytes) -> bytes:
        self.requests.append(head)
        return self.answers[min(len(self.requests), len(self.answers)) - 1]


def answer(status: int, *headers: str, body: bytes = b"", sized: bool = True) -> bytes:
    """An answer; `sized`: with the length of its body."""
    lines = [f"HTTP/1.1 {status} Said", *headers, *([f"Content-Length: {len(body)}"] if sized else [])]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _talk(server: ScriptedServer, connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while True:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (more := connection.recv(1 << 16)):
                    return
                head += more
            sent = server.answer_to(head)
            connection.sendall(sent)
            if b"Connection: close" in sent:
                return


@contextlib.contextmanager
def scripted_server(*answers: bytes) -> Iterator[ScriptedServer]:
    """Start one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = ScriptedServer(f"http://127.0.0.1:{listening.getsockname()[1]}", answers)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=_talk, args=(server, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server
        finally:
            listening.shutdown(socket.SHUT_RDWR)
