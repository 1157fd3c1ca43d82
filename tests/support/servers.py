"""Real servers on loopback for the tests of remote caches: nginx, moto's S3, and one that fails on purpose."""

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.credentials import KEY_ID, PASSWORD, SECRET_KEY, USER, declare
from tests.support.recorded import Record, as_text, lines_added_to, recorded
from tests.support.warm_python import with_root

KEYS = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
_IS_LOGGED = "/is-all-logged"
_NGINX = """
daemon off; pid {root}/nginx.pid; error_log {root}/error.log; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{
  log_format ranges '$request_method $uri $http_range $status';
  log_format headers escape=json '$request~~authorization: $http_authorization~~cookie: $http_cookie'
    '~~proxy-authorization: $http_proxy_authorization~~x-amz-security-token: $http_x_amz_security_token~~referer: $http_referer';
  access_log {root}/access.log ranges;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  server {{
    listen 127.0.0.1:{port}; root {root}/www; autoindex on; {rate}
    access_log {root}/access.log ranges; access_log {root}/headers.log headers;
  }}
  server {{
    listen 127.0.0.1:{tls_port} ssl; root {root}/www;
    ssl_certificate {root}/cert.pem; ssl_certificate_key {root}/key.pem;
    auth_basic "lab"; auth_basic_user_file {root}/users;
    access_log {root}/access.log ranges; access_log {root}/tls-headers.log headers;
  }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class Nginx:
    """nginx that serves `www`: at `url`, and with TLS and a password at `tls_url`. `certificate`: self-made."""

    www: Path
    url: str
    tls_url: str
    certificate: Path
    log: Path

    def requests(self) -> list[str]:
        """Lines `GET /path bytes=a-b 206` so far."""
        # A request is logged after its answer has gone out, and before the next one is looked at.
        with contextlib.closing(http.client.HTTPConnection(self.url.removeprefix("http://"))) as connection:
            connection.request("GET", _IS_LOGGED)
            connection.getresponse().read()
        return [line for line in self.log.read_text().splitlines() if _IS_LOGGED not in line]


def free_port() -> int:
    """A port that nobody has, out of those that the system gives to no connection of its own (from 32768 on)."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def nginx(root: Path, *, rate: str = "") -> Iterator[Nginx]:
    """Start nginx; skips, saying so, where it is not installed."""
    program = shutil.which("nginx") or shutil.which(
        "nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin"
    )
    if program is None or shutil.which("openssl") is None:
        pytest.skip("no nginx (or no openssl) here: apt-get install nginx-light")
    port, tls_port, www = free_port(), free_port(), root / "www"
    www.mkdir(parents=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-addext", "basicConstraints=critical,CA:FALSE",
         "-keyout", str(root / "key.pem"), "-out", str(root / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    hashed = subprocess.run(
        ["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True
    ).stdout.strip()
    (root / "users").write_text(f"{USER}:{hashed}\n")
    user = "user root;" if os.geteuid() == 0 else ""
    (root / "nginx.conf").write_text(
        _NGINX.format(root=root, port=port, tls_port=tls_port, user=user, rate=rate)
    )
    process = subprocess.Popen(
        [program, "-c", str(root / "nginx.conf"), "-p", str(root), "-e", str(root / "error.log")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        server = Nginx(
            www=www,
            url=f"http://127.0.0.1:{port}",
            tls_url=f"https://localhost:{tls_port}",
            certificate=root / "cert.pem",
            log=root / "access.log",
        )
        with (
            recorded("nginx", fetch=_sent_to(server, "headers.log")),
            recorded("nginx with TLS", given=[PASSWORD], fetch=_sent_to(server, "tls-headers.log")),
        ):
            yield server
    finally:
        process.terminate()
        process.wait(timeout=60)


def _sent_to(server: Nginx, log: str) -> Callable[[], list[str]]:
    added = lines_added_to(server.log.with_name(log))
    declare(server.log.parent)

    def sent() -> list[str]:
        with contextlib.suppress(OSError):  # it may have been stopped meanwhile
            server.requests()
        return [
            re.sub(r"~~([a-z-]+: )", r"\n\1", re.sub(r"~~[a-z-]+: (?=~~|$)", "", line)) for line in added()
        ]

    return sent


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Start moto's server with a bucket `lab`; skips, saying so, where it is not installed. Yields its URL."""
    pytest.importorskip("moto", reason="no moto here: pip install 'evl-cache[test]'")
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.support.recording_moto",
                str(port),
                f"{log}.headers",
            ],
            stdout=out,
            stderr=out,
            env=os.environ | KEYS | {"PYTHONPATH": with_root()},
            start_new_session=True,
        )
    try:
        _wait_for(port, process)
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(urllib.request.Request(f"{url}/lab", method="PUT")) as answer:
            assert answer.status == 200
        declare(Path(f"{log}.headers"))
        sent = lines_added_to(Path(f"{log}.headers"))
        with recorded("moto", given=[KEY_ID], fetch=lambda: map(json.loads, sent())):
            yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended at once"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


Fault = Callable[[str, bytes], bytes | int | None]


@dataclass
class FaultyServer:
    """Serves a directory over HTTP with ranges. `fault(path, body)` gives other bytes (a short body is a dropped
    connection), or a status to answer with, or None. `served`: (path, bytes sent) of every answer; `asked`: the path of every
    request, answered or not."""

    root: Path
    fault: Fault = lambda path, body: None
    served: list[tuple[str, int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    record: Record = field(default_factory=lambda: Record("faulty server"))


def _listing(folder: Path) -> bytes:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()


@contextlib.contextmanager
def faulty_server(root: Path, *, given: tuple[str, ...] = ()) -> Iterator[FaultyServer]:
    """Start one; its faults may be changed while it runs. given: credentials that it may be sent."""
    state = FaultyServer(root=root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.record.requests.append(as_text(self.requestline, self.headers.items()))
            path = state.root / self.path.lstrip("/")
            state.asked.append(self.path)
            is_folder = path.is_dir() and self.path.endswith("/")
            if not is_folder and not path.is_file():
                self.send_error(404)
                return
            body, status = _listing(path) if is_folder else path.read_bytes(), 200
            size = len(body)
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or size - 1) + 1, size)
                if start >= stop:
                    self.send_error(416)
                    return
                body, status = body[start:stop], 206
            answer = state.fault(self.path, body)
            if isinstance(answer, int):
                self.send_error(answer)
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Mon, 02 Jan 2023 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            sent = body if answer is None else answer
            state.served.append((self.path, len(sent)))  # before who reads it goes on
            with contextlib.suppress(ConnectionError):
                self.wfile.write(sent)
            if len(sent) < len(body):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with recorded("faulty server", given=given) as state.record, answering(Handler) as state.url:
        yield state


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of the usual five, the next is dropped, and comes again after a second


@contextlib.contextmanager
def answering(
    handler: type[BaseHTTPRequestHandler], *, at_the_end: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Serve by a handler, a thread a request; yields the address. at_the_end: frees requests that are held back."""
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            at_the_end()
            server.shutdown()
            thread.join(timeout=60)
