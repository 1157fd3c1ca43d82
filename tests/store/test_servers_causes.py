"""What can be wrong with a server: each cause, by a server that has it, gives a line of its own with its own remedy."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evl_cache.errors import CacheError, EvlCacheError, UsageError
from evl_cache.store import FeatureCache, open_objects
from tests.support.bad_answers import Answer, Request
from tests.support.bad_servers import NOTHING_WRONG, Always, BadServer, misbehaving_server
from tests.support.certificates import Certificate, make_certificate
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.redirects import redirecting
from tests.support.servers import free_port
from tests.support.store_helpers import wait_until
from tests.support.warm_python import warm_python

SILENT = ("silence", "stops in the middle")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_cache(folder / "a")
    shutil.rmtree(folder / "a" / "locks")
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    patience_of_attempts(monkeypatch)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@contextlib.contextmanager
def always(root: Path, fault: str) -> Iterator[BadServer]:
    """A server that has one fault, whatever it is asked for."""
    with misbehaving_server(root, NOTHING_WRONG) as server:
        server.schedule = Always(fault)
        yield server


def line_of(url: str, words: str) -> str:
    """The line that opening a cache ends with."""
    with pytest.raises(EvlCacheError) as raised:
        FeatureCache(url)
    text = str(raised.value)
    assert "\n" not in text and re.search(words, text) and ";" in text, text
    assert "repair" not in text
    return text


def assert_reads(url: str, root: Path) -> None:
    remote, local = FeatureCache(url), FeatureCache(root / "a")
    samples = list(range(len(local)))
    for got, expected in zip(remote.read(samples), local.read(samples), strict=True):
        assert got is not None and expected is not None
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# What servers answer

REFUSED = {
    "400": "the server answers 400 Bad Request",
    "401": "access denied; put user and password for the host into .*netrc",
    "403": "access denied; put user and password for the host into .*netrc",
    "404": "no cache",
    "429": "the server answers 429 Too Many Requests.* later",
    "500": "the server answers 500 Internal Server Error",
    "503": "the server answers 503 Service Unavailable",
    "redirect in a circle": "sends requests in a circle",
    "sign-in page": "a web page comes instead of the file.* sign in",
    "gzip": r"compresses its answers \(gzip\).* turned off",
    "cut before": "the connection broke off.* check the connection",
    "cut in headers": "the connection broke off",
    "cut in the body": "the connection broke off",
    "silence": "it does not answer",
    "stops in the middle": "its answer stopped half way",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_answer_that_is_of_no_use_is_told_by_its_cause(
    root: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault in SILENT:
        patience_of_attempts(monkeypatch, 0, silence_s=2.0)
    with always(root, fault) as server:
        line_of(f"{server.url}/a", REFUSED[fault])


@pytest.mark.parametrize(
    "fault", ["no length", "chunked", "the whole file", "redirect on this host", "another tag"]
)
def test_an_unusual_answer_that_holds_the_file_is_taken(root: Path, fault: str) -> None:
    with always(root, fault) as server:
        if fault == "redirect on this host":
            server.schedule, right = None, server.answer

            def once(request: Request) -> tuple[Answer, bytes]:
                if "?" in request.path:
                    return right(request)
                return Answer(status=308, headers={"Location": f"{request.path}?again=1"}), b""

            server.answer = once
        assert_reads(f"{server.url}/a", root)


@pytest.mark.parametrize("fault", ["another range", "other bytes"])
def test_another_part_than_was_asked_for_is_never_taken(root: Path, fault: str) -> None:
    with always(root, fault) as server:
        line_of(
            f"{server.url}/a",
            "other bytes than were asked for|damaged|not what|does not match|is no|not a|is not|cannot be read",
        )


def test_pythons_own_server_which_knows_no_ranges_is_read_from(root: Path) -> None:
    port = free_port()
    command = [warm_python(), "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(root), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(port), what="the server listens")
        assert_reads(f"http://127.0.0.1:{port}/a", root)
        assert open_objects(f"http://127.0.0.1:{port}").folders() == ["a"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


# TLS


def at(
    certificate: Certificate, root: Path, host: str = "localhost"
) -> "contextlib.AbstractContextManager[BadServer]":
    return misbehaving_server(root, NOTHING_WRONG, tls=certificate.server_context(), host=host)


def test_a_certificate_that_nobody_knows_is_named_and_ours_is_taken(
    root: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at(certificate, root) as server:
        line_of(f"{server.url}/a", r"certificate of localhost is not accepted \(self.signed.*SSL_CERT_FILE=")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))
        assert_reads(f"{server.url}/a", root)


def test_a_certificate_of_another_host_and_an_expired_one_are_told_apart(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, options, words in (
        (
            "other",
            {"host": "elsewhere.example"},
            "(?i)localhost.*(mismatch|not valid for).*name that the certificate is for",
        ),
        ("expired", {"days_ago": 9, "days": 3}, "certificate has expired.*(clock|renew)"),
        ("early", {"days_ago": -9}, "not yet valid.*clock"),
    ):
        made = make_certificate(tmp_path / name, **options)  # type: ignore[arg-type]
        monkeypatch.setenv("SSL_CERT_FILE", str(made.path))
        with at(made, root) as server:
            line_of(f"{server.url}/a", words)


def test_a_file_of_certificates_that_is_none_is_named(
    root: Path, certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.pem").write_text("not PEM")
    with at(certificate, root) as server:
        for name, words in (("no.pem", "no certificate in PEM"), ("missing.pem", "No such file")):
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
            assert "SSL_CERT_FILE" in line_of(f"{server.url}/a", f"{name}.*{words}")


def test_plain_http_at_a_port_of_tls_and_the_reverse(root: Path, certificate: Certificate) -> None:
    with at(certificate, root) as safe, misbehaving_server(root, NOTHING_WRONG, host="localhost") as plain:
        line_of(f"{safe.url.replace('https:', 'http:')}/a", "https|broke off|does not speak HTTP")
        line_of(f"{plain.url.replace('http:', 'https:')}/a", "does not speak TLS at this port; use http://")


# Nobody there


def test_a_name_that_nobody_knows(root: Path) -> None:
    line_of("http://no-such-host.invalid/a", r"name no-such-host\.invalid is not known \(DNS\)")


def test_a_port_where_nobody_listens(root: Path) -> None:
    line_of(f"http://127.0.0.1:{free_port()}/a", "nothing listens there")


def test_a_port_that_never_answers_and_one_that_takes_no_connection(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience_of_attempts(monkeypatch, 1, silence_s=0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and that is all
        line_of(f"http://127.0.0.1:{silent.getsockname()[1]}/a", "does not answer")
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # the queue is full from here on: the system answers no more
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        line_of(f"http://127.0.0.1:{full.getsockname()[1]}/a", "does not answer")


def test_what_is_no_http_is_told(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        import threading

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        threading.Thread(target=greet, daemon=True).start()
        line_of(f"http://127.0.0.1:{listener.getsockname()[1]}/a", "does not speak HTTP")
        listener.shutdown(socket.SHUT_RDWR)


# Addresses and listings


def test_an_address_of_ip_version_6(root: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with misbehaving_server(root, NOTHING_WRONG, host="::1") as server:
        assert "[::1]" in server.url
        assert_reads(f"{server.url}/a", root)
        assert open_objects(server.url).folders() == ["a"]


@pytest.mark.parametrize("url", ["http://[::1/a", "http://host:port/a", "http://host:99999/a", "https://"])
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(UsageError, match=r"expected|address"):
        open_objects(url)


LINKS = {
    '<a href="./a/">a</a>': ["a"],
    '<a href="/caches/a/">a</a>': ["a"],
    '<a href="{url}/caches/a/">a</a>': ["a"],
    '<A HREF="a/">a</A>': ["a"],
    "<a class=x href='a/'>a</a>": ["a"],
    "<a href=a/ >a</a>": ["a"],
    '<a href="a%20b%2Bc/">a</a>': ["a b+c"],
    '<a href="caf%C3%A9/">a</a>': ["café"],
    '<a href="a&amp;b/">a</a>': ["a&b"],
    '<a href="../">up</a><a href="../../etc/">up</a><a href="%2e%2e/">up</a>': [],
    '<a href="..%2fetc/">up</a><a href="a%2fb/">deep</a><a href="a/b/">deep</a>': [],
    '<a href="/">root</a><a href="/etc/">root</a><a href="/caches/">itself</a><a href="./">itself</a>': [],
    '<a href="http://elsewhere.example/caches/a/">other</a><a href="//elsewhere.example/caches/a/">other</a>': [],
    '<a href="http://127.0.0.1:1/caches/a/">other port</a><a href="mailto:x@y/">mail</a><a href="http://[/">bad</a>': [],
    '<a href="file.bin">file</a><a href="?C=M;O=A">order</a><a name="x">none</a><a href="a/?x=1">query</a>': [],
}


@pytest.mark.parametrize("page", LINKS)
def test_a_listing_names_the_folders_below_it_however_it_is_written(tmp_path: Path, page: str) -> None:
    with misbehaving_server(tmp_path, NOTHING_WRONG) as server:
        body = page.replace("{url}", server.url).encode()
        server.answer = lambda request: (
            Answer(status=200, headers={"Content-Type": "text/html"}, body=body), body
        )  # fmt: skip
        assert open_objects(f"{server.url}/caches").folders() == LINKS[page]


def test_a_listing_that_is_forbidden_says_how_to_do_without(root: Path) -> None:
    with always(root, "403") as server, pytest.raises(CacheError, match="name the cache itself, turn on"):
        open_objects(server.url).folders()


def test_a_sign_in_page_is_no_empty_listing(root: Path) -> None:
    page = b"<html><title>Sign in</title><form><input name=u><input type=password name=p></form></html>"
    with misbehaving_server(root, NOTHING_WRONG) as server, always(root, "sign-in page") as elsewhere:
        server.answer = lambda request: (Answer(status=200, body=page), page)
        with pytest.raises(CacheError, match="web page"):
            open_objects(server.url).folders()
        redirecting(server, elsewhere.url)  # as single sign-on does, whose page may be all script
        with pytest.raises(CacheError, match=f"web page.*{elsewhere.url}"):
            open_objects(server.url).folders()
