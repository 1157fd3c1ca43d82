"""Servers whose answers are odd: each is read right, asked for again, or told in one true line; no trace of Python."""

import base64
import contextlib
import io
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evl_cache.errors import EvlCacheError, Unreachable, UsageError
from evl_cache.store.objects import s3_objects, waits
from evl_cache.store.objects.address import split_url
from evl_cache.store.objects.listing_page import read_listing
from evl_cache.store.objects.logins import login_of
from evl_cache.store.objects.objects import Objects, open_objects, open_writable
from evl_cache.store.objects.troubles import retry_after_s
from tests.support.patience import patience_of_attempts
from tests.support.scripted_server import ScriptedServer, answer, scripted_server

OK = answer(200, body=b"ok")
CUT = answer(200, "Content-Length: 10", "Connection: close", body=b"0123", sized=False)
DIGITS = "9" * 5000  # more than Python reads as a number


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-1a2b3c")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-4d5e6f")
    patience_of_attempts(monkeypatch)


@contextlib.contextmanager
def files(kind: str, *answers: bytes) -> Iterator[tuple[Objects, ScriptedServer]]:
    """Files of an HTTP server or a bucket that answers so."""
    with scripted_server(*answers) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        yield open_objects("s3://lab/p" if kind == "s3" else server.url), server


BOTH = pytest.mark.parametrize("kind", ["http", "s3"])


@BOTH
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (CUT, "broke off"),
        (answer(206, "Content-Range: bytes 0-4/10", body=b"hello"), "206 Partial|part of the file came"),
        (answer(206, body=b"hello"), "206 Partial|part of the file came"),
        (answer(416, body=b"error"), "416"),
        (answer(200, f"Content-Length: {DIGITS}", body=b"hello", sized=False), "digits"),
        (answer(307, "Location: http://127.0.0.1:1/"), "answers 307|nothing listens there"),
        (answer(503, f"Retry-After: {DIGITS}"), "asked again in 31622400 s"),
        (b"what is this?\r\n\r\n Connection: close", "does not speak HTTP"),
    ],
    ids=["cut", "part", "unnamed-part", "416", "digits", "elsewhere", "retry", "no-http"],
)
# boto3 leaves the connection to the garbage collector where it cannot read an answer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_answer_that_is_not_the_file_is_one_line(kind: str, sent: bytes, expected: str) -> None:
    with files(kind, sent) as (objects, _), pytest.raises(EvlCacheError, match=expected) as told:
        objects.get("x", most_nbytes=100)
    assert type(told.value) is Unreachable and "\n" not in str(told.value)


@pytest.mark.parametrize("login", ["", "user:pa-ss@"])
@pytest.mark.parametrize("target", ["http://127.0.0.1:99999/", "http://[::1/", "ftp://lab/x", "http://h:x/"])
def test_a_request_that_is_sent_on_to_no_address(target: str, login: str) -> None:
    with scripted_server(answer(302, f"Location: {target}")) as server:
        objects = open_objects(server.url.replace("//", f"//{login}"))
        with pytest.raises(Unreachable, match="sends requests on to what is no address; check the address"):
            objects.get("x", most_nbytes=100)


@BOTH
@pytest.mark.parametrize("bad", [CUT, b"XXXX 200 OK\r\n\r\nConnection: close"], ids=["cut", "garbled"])
def test_one_bad_answer_is_asked_for_again(kind: str, bad: bytes) -> None:
    with files(kind, bad, OK) as (objects, server):
        assert objects.get("x", most_nbytes=100) == b"ok"
        assert len(server.requests) == 2


@BOTH
def test_parts_of_files(kind: str) -> None:
    """Fewer bytes than were asked for are the file's end only where the server says so."""
    short = answer(206, "Content-Range: bytes 0-3/100", body=b"0123")
    whole = answer(206, "Content-Range: bytes 0-9/100", body=b"0123456789")
    with files(kind, short, whole) as (objects, server):
        assert bytes(objects.get_range("x", 0, 10)) == b"0123456789" and len(server.requests) == 2
    with files(kind, answer(206, "Content-Range: bytes 0-3/4", body=b"0123")) as (objects, _):
        assert bytes(objects.get_range("x", 0, 10)) == b"0123"
    with files(kind, answer(206, "Content-Range: bytes 0-3/*", body=b"0123")) as (objects, _):
        assert bytes(objects.get_range("x", 0, 10)) == b"0123"
    with (
        files(kind, answer(206, f"Content-Range: bytes 0-9/{DIGITS}", body=b"0123456789")) as (objects, _),
        pytest.raises(Unreachable),
    ):
        objects.get_range("x", 0, 10)


@BOTH
def test_an_answer_in_chunks_has_no_length(kind: str) -> None:
    sent = answer(200, "Transfer-Encoding: chunked", body=b"4\r\n0123\r\n0\r\n\r\n", sized=False)
    with files(kind, sent) as (objects, _):
        assert objects.get("x", most_nbytes=4) == b"0123"
        with pytest.raises(EvlCacheError, match="has more bytes, expected at most 3"):
            objects.get("x", most_nbytes=3)


def test_a_compressed_object_is_not_taken_for_the_file() -> None:
    with (
        files("s3", answer(200, "Content-Encoding: gzip", body=b"0123")) as (objects, _),
        pytest.raises(Unreachable, match=r"compresses its answers \(gzip\)"),
    ):
        objects.get("x", most_nbytes=100)


@pytest.mark.parametrize("year", ["0001", "9999", "9" * 20])
def test_any_date_may_stand_in_retry_after(year: str) -> None:
    found = retry_after_s(f"Mon, 01 Jan {year} 00:00:00 GMT")
    assert found is None or 0 <= found <= 366 * 86400


def test_a_listing_that_is_none_is_not_empty() -> None:
    to_login = answer(302, "Location: /login")
    page = answer(200, "Content-Type: text/html", body=b"<html>Welcome</html>")
    with files("http", to_login, page) as (objects, _), pytest.raises(Unreachable, match="to sign in"):
        objects.folders()
    json = answer(200, "Content-Type: application/json", body=b'[{"name": "a"}]')
    with files("http", json) as (objects, _), pytest.raises(Unreachable, match="is application/json, no web"):
        objects.folders()
    with files("http", page) as (objects, _):
        assert objects.folders() == []
    assert read_listing(b'<a href="https://LAB:443/c/a/">', "https://lab/c/").folders == ["a"]


def test_a_page_that_a_script_makes_is_no_empty_listing() -> None:
    page = b'<!doctype html><html><body><div id="root"></div><script src="/app.js"></script></body></html>'
    told = r"made by a script in a browser.*; name the cache itself"
    with (
        files("http", answer(200, "Content-Type: text/html", body=page)) as (objects, _),
        pytest.raises(Unreachable, match=told),
    ):
        objects.folders()
    empty = b'<html><script src="/sort.js"></script><a href="../">..</a></html>'
    with files("http", answer(200, "Content-Type: text/html", body=empty)) as (objects, _):
        assert objects.folders() == []


@BOTH
def test_a_proxys_password_is_not_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "user:pa-ss@127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://lab.invalid")
    with pytest.raises(Unreachable, match=r"the proxy .*fails") as told:
        open_objects("s3://lab/p" if kind == "s3" else "http://lab.invalid").get("x", most_nbytes=1)
    assert "pa-ss" not in str(told.value)


def test_a_proxy_that_is_set_later_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with files("s3", OK) as (objects, _):
        assert objects.get("x", most_nbytes=9) == b"ok"
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        with pytest.raises(Unreachable, match="the proxy fails"):
            objects.get("x", most_nbytes=9)


def test_an_endpoints_password_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("99999", "1", "x"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:pa-ss@127.0.0.1:{port}")
        with pytest.raises(EvlCacheError) as told:
            open_objects("s3://lab/p").get("x", most_nbytes=1)
        assert "pa-ss" not in str(told.value)


def test_certificates_that_are_none_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(UsageError, match=r"AWS_CA_BUNDLE is .*none.pem: No such file"):
        open_objects("s3://lab/p")


@BOTH
def test_no_credential_in_logs_and_representations(kind: str) -> None:
    secrets = ["pa-ss", base64.b64encode(b"user:pa-ss").decode(), "secret-1a2b3c", "token-4d5e6f"]
    log, text = logging.getLogger(), io.StringIO()
    handler, before = logging.StreamHandler(text), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        with files(kind, OK) as (objects, server):
            if kind == "http":
                objects = open_objects(server.url.replace("//", "//user:pa-ss@"))
            assert objects.get("x", most_nbytes=9) == b"ok"
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    found = text.getvalue() + repr(login_of(split_url("http://user:pa-ss@lab/")))
    assert not [secret for secret in secrets if secret in found]


def test_logins_of_netrc_are_for_the_hosts_it_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path / "netrc"
    named.write_text("machine Lab.Example login me password mine\ndefault login any password leaks\n")
    monkeypatch.setenv("NETRC", str(named))
    assert login_of(split_url("https://lab.example/c")).header is not None
    stranger = login_of(split_url("https://stranger.example/c"))
    assert stranger.header is None and "its entry default is not used" in stranger.remedy


def test_who_is_not_waited_for_any_more_ends_at_its_next_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a trickle would keep a thread and a connection for days after each attempt."""
    patience_of_attempts(monkeypatch, silence_s=0.3)
    ended = threading.Event()

    def trickle(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)
        ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=trickle, args=(listening,), daemon=True).start()
        with pytest.raises(Unreachable, match=r"does not answer|half way"):
            open_objects(f"http://127.0.0.1:{listening.getsockname()[1]}").get("x", most_nbytes=10**9)
        assert ended.wait(30)


def test_a_slow_upload_of_bytes_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_SILENCE_S", 2.5)
    monkeypatch.setattr(s3_objects, "_PART_NBYTES", 1 << 30)
    requests = []

    def read_slowly(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut
            while True:
                connection, _ = listening.accept()
                requests.append(connection)
                threading.Thread(target=swallow, args=(connection,), daemon=True).start()

    def swallow(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(1 << 16)
                head, _, body = head.partition(b"\r\n\r\n")
                left = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(body)
                if b"100-continue" in head.lower():
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                while left > 0:
                    left -= len(connection.recv(1 << 16))
                    time.sleep(0.008)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "1"\r\n\r\n')

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        threading.Thread(target=read_slowly, args=(listening,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        began = time.monotonic()
        open_writable("s3://lab/p").put("x", bytes(32_000_000))
        assert time.monotonic() - began > 2.5, "as slow as a silence is long"
        listening.shutdown(socket.SHUT_RDWR)
    assert len(requests) == 1
