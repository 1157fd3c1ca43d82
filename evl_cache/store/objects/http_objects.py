"""A cache's files on an HTTP server, through urllib3."""

import contextlib
import http.client
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError

from evl_cache.errors import CacheError, EvlCacheError, UsageError
from evl_cache.store.objects.address import Data, public_url
from evl_cache.store.objects.bodies import read_known, read_most
from evl_cache.store.objects.causes import error_trouble
from evl_cache.store.objects.connections import client, proxy_for
from evl_cache.store.objects.listing_page import is_web_page, read_listing
from evl_cache.store.objects.logins import is_given_for, login_of
from evl_cache.store.objects.troubles import Trouble, status_trouble
from evl_cache.store.objects.waits import Attempt, Server

_MOST_REDIRECTS = 5
_MOST_LISTING_NBYTES = 16 << 20
_MOST_PASSED_OVER_NBYTES = 32 << 20  # of a file that comes whole where a part was asked for
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Answer:
    """An answer that begins: its headers are here, its body is not.

    Attributes:
        response: of urllib3.
        url: where it came from at last.
    """

    response: urllib3.BaseHTTPResponse
    url: str

    @property
    def size(self) -> int | None:
        """How many bytes its body is said to have; None where that is not said."""
        told = self.response.headers.get("content-length", "")
        return int(told) if told.isdecimal() else None


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
        self._proxy = proxy_for(url)
        self._server = Server(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".lower())

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """See `Objects`."""

        def read(attempt: Attempt) -> bytes:
            with self._answer(self._address(name)) as answer:
                attempt.came(0)
                _check_is_file(answer)
                size, found = answer.size, None
                if size is None or size <= most_nbytes:
                    found = read_most(answer.response, most_nbytes, attempt)
                if found is None:
                    told = "more" if size is None else size
                    raise CacheError(f"{self.url}/{name}: has {told} bytes, expected at most {most_nbytes}")
                _check_is_no_page(answer, found)
                if not found and not answer.response.headers.get("content-length"):
                    raise Trouble.broken()  # among its headers, which urllib3 takes for an answer
                return found

        return self._ask(name, read)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""

        def read(attempt: Attempt) -> Data:
            with self._answer(self._address(name), part=f"bytes={start}-{start + nbytes - 1}") as answer:
                attempt.came(0)
                if answer.response.status == 416:  # the file ends before `start`
                    return b""
                _check_is_file(answer)
                if answer.response.status != 206:
                    return _part_of_whole(answer, start, nbytes, attempt)
                told = answer.response.headers.get("content-range", "")
                expected = range_nbytes(told, start, nbytes)
                found = read_known(answer.response, expected, attempt)
                if len(found) < expected:
                    raise Trouble.broken()
                return found

        return self._ask(name, read) if nbytes else b""

    def folders(self) -> list[str]:
        """See `Objects`: what the links of the server's own listing lead to."""

        def read(attempt: Attempt) -> list[str]:
            with self._answer(f"{self.url}/", listing=True) as answer:
                attempt.came(0)
                _check_is_file(answer)
                page = read_most(answer.response, _MOST_LISTING_NBYTES, attempt)
                if page is None:
                    raise Trouble("its listing is too long", "name the cache itself", has_answered=True)
                _check_is_html(answer)
                found = read_listing(page, answer.url)
                # A page without folders that came from elsewhere is hardly the folder's own.
                if found.wants_password or (not found.folders and not self._is_own(answer.url)):
                    raise _sign_in(answer)
                if found.needs_script:
                    raise Trouble(
                        "its page is made by a script in a browser, and links to nothing here",
                        "name the cache itself, or have the server list its folders",
                        has_answered=True,
                    )
                return found.folders

        return self._ask("", read)

    def end_waits(self) -> None:
        """See `Objects`."""
        self._server.end_waits()

    def _is_own(self, url: str) -> bool:
        paths = {unquote(urlsplit(one).path).rstrip("/") for one in (self.url, url)}
        return len(paths) == 1 and is_given_for(self.url, url)

    def _address(self, name: str) -> str:
        return f"{self.url}/{quote(name)}"

    def _ask(self, name: str, read: Callable[[Attempt], _T]) -> _T:
        place = f"{self.url}/{name}".rstrip("/")
        try:
            return self._server.ask(place, read)
        except FileNotFoundError:
            raise FileNotFoundError(f"{place}: no such file") from None

    @contextlib.contextmanager
    def _answer(self, url: str, *, part: str | None = None, listing: bool = False) -> Iterator[_Answer]:
        """Yield an answer that is a file, or, where a part is asked for, that, or that its end is passed.

        Raises: FileNotFoundError; Trouble.
        """
        try:
            answer = self._follow(url, {} if part is None else {"Range": part})
            try:
                self._check_status(answer.response, listing)
                if part is None and answer.response.status != 200:  # part of a file, or the page of an error
                    raise status_trouble(answer.response.status, answer.response.headers)
                yield answer
            finally:
                answer.response.drain_conn() if _is_nearly_read(answer.response) else answer.response.close()
                answer.response.release_conn()
        except (FileNotFoundError, EvlCacheError):
            raise
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            shown = None if self._proxy is None else public_url(self._proxy)
            raise error_trouble(error, host=self._host, proxy=shown) from error

    def _follow(self, url: str, headers: dict[str, str]) -> _Answer:
        """Return the answer to a request, from where the server sends it on to. The login goes to its own host only."""
        here = url
        for _ in range(_MOST_REDIRECTS + 1):
            own = {**headers, "Accept-Encoding": "identity", "User-Agent": "evl-cache"}
            if self._login.header is not None and is_given_for(self.url, here):
                own["Authorization"] = self._login.header
            proxy = self._proxy if here is url else proxy_for(here)
            response = client(here, proxy).urlopen(
                "GET", here, headers=own, redirect=False, preload_content=False, decode_content=False
            )
            location = response.headers.get("location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return _Answer(response, here)
            response.close()
            target = _target(here, location)
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


def _target(here: str, location: str) -> SplitResult:
    """Return where a server sends a request on to. Raises: Trouble where that is no address of a server."""
    try:
        target = urlsplit(urljoin(here, location))
        if target.scheme in ("http", "https") and target.hostname and target.port != 0:
            return target
    except ValueError:  # what Python says of it may hold a password
        pass
    raise Trouble(
        "the server sends requests on to what is no address",
        "check the address, or ask who keeps the server",
        has_answered=True,
    )


def _check_is_file(answer: _Answer) -> None:
    """Raises: Trouble where what comes is not the file as it lies there."""
    encoding = answer.response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Trouble.compressed(encoding)


def _check_is_html(answer: _Answer) -> None:
    """Raises: Trouble where a listing is one for programs, which would seem to name no folders."""
    kind = answer.response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and "html" not in kind and not kind.startswith("text/"):
        raise Trouble(
            f"its listing is {kind}, no web page",
            "have the server list folders as HTML (nginx: autoindex_format html), or name the cache itself",
            has_answered=True,
        )


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


def range_nbytes(told: str, start: int, nbytes: int) -> int:
    """Return how many of the bytes asked for come, as Content-Range tells. Raises: Trouble where others do."""
    found = _RANGE.fullmatch(told.strip())
    if found is not None:
        first, last = int(found[1]), int(found[2])
        wanted = start + nbytes - 1 if found[3] == "*" else min(start + nbytes, int(found[3])) - 1
        # A server that does not tell the size may know of less.
        if first == start and (last == wanted or (found[3] == "*" and first <= last < wanted)):
            return last - first + 1
    raise Trouble(
        "the server answers with other bytes than were asked for",
        "check what is between it and you (a proxy, a cache), or ask who keeps the server",
        may_pass=True,
        has_answered=True,
    )


def _part_of_whole(answer: _Answer, start: int, nbytes: int, attempt: Attempt) -> Data:
    """Return a part of a file that comes whole, as from servers that know no ranges, unless too much would be passed over."""
    size = answer.size
    wanted = start + nbytes if size is None else min(start + nbytes, size)
    if wanted > _MOST_PASSED_OVER_NBYTES:
        raise Trouble(
            "the server gives whole files only, no parts (no Range requests; python -m http.server is so)",
            "serve the cache with nginx or from a bucket, or copy its directory",
            has_answered=True,
        )
    found = read_known(answer.response, wanted, attempt)
    _check_is_no_page(answer, bytes(found[:1024]))
    if len(found) < wanted and (size is not None or not found):
        raise Trouble.broken()
    return found[start:]


def _is_nearly_read(response: urllib3.BaseHTTPResponse) -> bool:
    left = response.length_remaining
    return left is not None and left <= 1 << 16
