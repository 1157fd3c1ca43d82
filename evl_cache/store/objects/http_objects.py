"""A cache's files on an HTTP server, through urllib3."""

import contextlib
import http.client
import os
import re
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import certifi
import urllib3
from urllib3.exceptions import HTTPError

from evl_cache.errors import CacheError, UsageError
from evl_cache.store.objects.address import Data, public_text, public_url
from evl_cache.store.objects.bodies import read_known, read_most
from evl_cache.store.objects.causes import error_trouble
from evl_cache.store.objects.listing_page import is_web_page, listed_folders
from evl_cache.store.objects.logins import is_given_for, login_of
from evl_cache.store.objects.troubles import Trouble, status_trouble
from evl_cache.store.objects.waits import Attempt, Server

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
_SERVERS, _CONNECTIONS = 16, 64  # connections to a server that are kept open, of so many servers
_MOST_REDIRECTS = 5
_MOST_LISTING_NBYTES = 16 << 20
_MOST_PASSED_OVER_NBYTES = 32 << 20  # of a file that comes whole where a part was asked for
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_T = TypeVar("_T")
_clients: dict[tuple[int, str | None, str | None, bool], urllib3.PoolManager] = {}


@dataclass(frozen=True)
class _Answer:
    """An answer that begins: its headers are here, its body is not.

    Attributes:
        response: of urllib3.
        url: where it came from at last.
    """

    response: urllib3.BaseHTTPResponse
    url: str


class HttpObjects:
    """Files below an http(s) address. See `Objects`.

    Raises: UsageError for what is no address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = public_url(url)
        if not parts.hostname:
            raise UsageError(f"{self.url}: expected https://host/path")
        self._host, self._login = parts.hostname, login_of(parts)
        self._proxy = _proxy_for(url)
        self._server = Server(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower())

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """See `Objects`."""

        def read(attempt: Attempt) -> bytes:
            with self._answer(self._address(name), {}) as answer:
                attempt.came(0)
                _check_is_file(answer)
                size = answer.response.headers.get("content-length", "")
                found = None
                if not size.isdecimal() or int(size) <= most_nbytes:
                    found = read_most(answer.response, most_nbytes, attempt)
                if found is None:
                    raise CacheError(
                        f"{self.url}/{name}: has {size or 'more'} bytes, expected at most {most_nbytes}"
                    )
                _check_is_no_page(answer, found)
                if not found and not answer.response.headers.get("content-length"):
                    raise Trouble.broken()  # among its headers, which urllib3 takes for an answer
                return found

        return self._ask(name, read)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""

        def read(attempt: Attempt) -> Data:
            with self._answer(
                self._address(name), {"Range": f"bytes={start}-{start + nbytes - 1}"}
            ) as answer:
                attempt.came(0)
                if answer.response.status == 416:  # the file ends before `start`
                    return b""
                _check_is_file(answer)
                if answer.response.status != 206:
                    return _part_of_whole(answer, start, nbytes, attempt)
                expected = _range_nbytes(answer, start, nbytes)
                found = read_known(answer.response, expected, attempt)
                if len(found) < expected:
                    raise Trouble.broken()
                return found

        return self._ask(name, read) if nbytes else b""

    def folders(self) -> list[str]:
        """See `Objects`: what the links of the server's own listing lead to."""

        def read(attempt: Attempt) -> list[str]:
            with self._answer(f"{self.url}/", {}, listing=True) as answer:
                attempt.came(0)
                _check_is_file(answer)
                page = read_most(answer.response, _MOST_LISTING_NBYTES, attempt)
                if page is None:
                    raise Trouble("its listing is too long", "name the cache itself", has_answered=True)
                found = listed_folders(page, answer.url)
                if found is None or (not found and not is_given_for(self.url, answer.url)):
                    raise _sign_in(answer)  # of another server at times, which lists no folder of this one
                return found

        return self._ask("", read)

    def end_waits(self) -> None:
        """See `Objects`."""
        self._server.end_waits()

    def _address(self, name: str) -> str:
        return f"{self.url}/{quote(name)}"

    def _ask(self, name: str, read: Callable[[Attempt], _T]) -> _T:
        place = f"{self.url}/{name}".rstrip("/")
        try:
            return self._server.ask(place, read)
        except FileNotFoundError:
            raise FileNotFoundError(f"{place}: no such file") from None

    @contextlib.contextmanager
    def _answer(self, url: str, headers: dict[str, str], *, listing: bool = False) -> Iterator[_Answer]:
        """Yield an answer that is a file, or that its end is passed. Raises: FileNotFoundError; Trouble."""
        try:
            answer = self._follow(url, headers)
            try:
                self._check_status(answer.response, listing)
                yield answer
            finally:
                answer.response.drain_conn() if _is_nearly_read(answer.response) else answer.response.close()
                answer.response.release_conn()
        except FileNotFoundError:
            raise
        except (HTTPError, OSError, http.client.HTTPException, UnicodeError) as error:
            shown = None if self._proxy is None else public_url(self._proxy)
            raise error_trouble(error, host=self._host, proxy=shown) from error

    def _follow(self, url: str, headers: dict[str, str]) -> _Answer:
        """Return the answer to a request, from where the server sends it on to. The login goes to its own host only."""
        here = url
        for _ in range(_MOST_REDIRECTS + 1):
            own = {**headers, "Accept-Encoding": "identity", "User-Agent": "evl-cache"}
            if self._login.header is not None and is_given_for(self.url, here):
                own["Authorization"] = self._login.header
            proxy = self._proxy if here is url else _proxy_for(here)
            response = _client(here, proxy).urlopen(
                "GET", here, headers=own, redirect=False, preload_content=False, decode_content=False
            )
            location = response.headers.get("location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return _Answer(response, here)
            response.close()
            target = urlsplit(urljoin(here, location))
            if target.scheme not in ("http", "https") or not target.hostname:
                break
            here = urlunsplit((target.scheme, target.netloc.rpartition("@")[2], *target[2:4], ""))
        raise Trouble("the server sends requests in a circle", "check the address", has_answered=True)

    def _check_status(self, response: urllib3.BaseHTTPResponse, listing: bool) -> None:
        status = response.status
        if status in (404, 410):
            raise FileNotFoundError
        if status in (401, 403):
            remedy = self._login.remedy
            if listing and status == 403:
                remedy = (
                    f"name the cache itself, turn on the server's listing (nginx: autoindex on), or {remedy}"
                )
            raise Trouble("access denied", remedy, has_answered=True)
        if status not in (200, 206, 416):
            raise status_trouble(status, response.headers)


def _client(url: str, proxy: str | None) -> urllib3.PoolManager:
    """Return what asks for an address, directly or through a proxy.

    All of a process share it, and so its connections; a forked process makes its own.
    """
    is_tls = url.lower().startswith("https:")
    key = (os.getpid(), proxy, os.environ.get("SSL_CERT_FILE") if is_tls else None, is_tls)
    if (client := _clients.get(key)) is None:
        options: dict[str, Any] = {
            "num_pools": _SERVERS,
            "maxsize": _CONNECTIONS,
            "retries": False,
            "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
            "ssl_context": tls_context() if is_tls else None,
        }
        client = urllib3.PoolManager(**options) if proxy is None else _through(proxy, options)
        client = _clients.setdefault(key, client)
    return client


def tls_context() -> ssl.SSLContext:
    """Return what proves servers' certificates: by the system's, or those that SSL_CERT_FILE names.

    Raises: UsageError where that is no file of certificates.
    """
    if named := os.environ.get("SSL_CERT_FILE"):
        try:
            return ssl.create_default_context(cafile=named)
        except (ssl.SSLError, OSError) as error:
            why = "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else f"{error.strerror}"
            raise UsageError(
                f"SSL_CERT_FILE is {named}: {why}; name a file of certificates, or unset it"
            ) from error
    context, known = ssl.create_default_context(), ssl.get_default_verify_paths()
    if not any((known.cafile, known.capath)):  # a Python that does not know the system's
        context.load_verify_locations(certifi.where())
    return context


def _proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for an address; looked for once, as that takes as long as a request."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    found = urllib.request.getproxies()
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        named = urlsplit(proxy)
        is_address = named.scheme in ("http", "https") and bool(named.hostname) and named.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(
            f"the proxy {public_text(proxy)} is no address; expected http://host:port in HTTP_PROXY and HTTPS_PROXY"
        )
    return proxy


def _through(proxy: str, options: dict[str, Any]) -> urllib3.PoolManager:
    parts, headers = urlsplit(proxy), None
    if parts.username is not None:
        headers = {"Proxy-Authorization": login_of(parts).header or ""}
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "", "", ""))
    return urllib3.ProxyManager(address, proxy_headers=headers, **options)


def _check_is_file(answer: _Answer) -> None:
    """Raises: Trouble where what comes is not the file as it lies there."""
    encoding = answer.response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Trouble.compressed(encoding)


def _check_is_no_page(answer: _Answer, content: bytes) -> None:
    is_html = "html" in answer.response.headers.get("content-type", "").lower()
    if is_html and is_web_page(content):
        raise _sign_in(answer)


def _sign_in(answer: _Answer) -> Trouble:
    return Trouble(
        f"a web page comes instead of the file, perhaps to sign in (from {public_url(answer.url)})",
        "give an address that serves the files themselves; put user and password for the host into ~/.netrc",
        has_answered=True,
    )


def _range_nbytes(answer: _Answer, start: int, nbytes: int) -> int:
    """Return how many of the bytes asked for come. Raises: Trouble where others do."""
    found = _RANGE.fullmatch(answer.response.headers.get("content-range", "").strip())
    if found is not None:
        first, last = int(found[1]), int(found[2])
        size = None if found[3] == "*" else int(found[3])
        wanted = start + nbytes - 1 if size is None else min(start + nbytes, size) - 1
        if (first, last) == (start, wanted):
            return last - first + 1
    raise Trouble(
        "the server answers with other bytes than were asked for",
        "check what is between it and you (a proxy, a cache), or ask who keeps the server",
        may_pass=True,
        has_answered=True,
    )


def _part_of_whole(answer: _Answer, start: int, nbytes: int, attempt: Attempt) -> Data:
    """Return a part of a file that comes whole, as from servers that know no ranges, unless too much would be passed over."""
    if start + nbytes > _MOST_PASSED_OVER_NBYTES:
        size = answer.response.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > _MOST_PASSED_OVER_NBYTES:
            raise Trouble(
                "the server gives whole files only, no parts (no Range requests; python -m http.server is so)",
                "serve the cache with nginx or from a bucket, or copy its directory",
                has_answered=True,
            )
    found = read_known(answer.response, start + nbytes, attempt)
    _check_is_no_page(answer, bytes(found[:1024]))
    size = answer.response.headers.get("content-length", "")
    if len(found) < start + nbytes and len(found) < (int(size) if size.isdecimal() else 1):
        raise Trouble.broken()
    return found[start:]


def _is_nearly_read(response: urllib3.BaseHTTPResponse) -> bool:
    left = response.length_remaining
    return left is not None and left <= 1 << 16
