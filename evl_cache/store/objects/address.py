"""Addresses of caches: which are URLs, and how one is shown without its credentials."""

import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit, urlunsplit

from evl_cache.errors import UsageError

SCHEMES = ("s3", "http", "https")
Data = bytes | bytearray | memoryview
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_URL_INSIDE = re.compile(r"[a-z][a-z0-9+.-]+:/+", re.IGNORECASE)


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL and not a directory. A URL that went through `Path` has lost a slash."""
    return _URL.match(str(place)) is not None


def as_url(place: str | Path) -> str:
    """Return a URL with both its slashes."""
    return _URL.sub(r"\1://", str(place), count=1)


def directory_of(place: str | Path) -> Path:
    """Return the directory of a cache that is to be changed, copied from or sent. Raises: UsageError for a URL."""
    if not is_url(place):
        return Path(place)
    shown = public_text(str(place))
    raise UsageError(
        f"{shown}: is an address, and this works on the directory where a cache lies; run it there, or on a copy, which "
        f"evl-cache pull {shown} makes"
    )


def public_text(text: str) -> str:
    """Return a word of a command line as it may be printed and stored: each URL in it as `public_url` has it."""
    begins = [found.start() for found in _URL_INSIDE.finditer(text)]
    if not begins:
        return text
    return text[: begins[0]] + "".join(
        public_url(text[begin:end]) for begin, end in zip(begins, [*begins[1:], len(text)], strict=True)
    )


def check_address(url: str) -> None:
    """Raises: UsageError for a URL of another kind than a cache may have, or one that cannot be read."""
    parts, shown = split_url(url), public_url(url)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise UsageError(f"{shown}: expected s3://bucket/prefix, http://host/path or https://host/path")
    if parts.query or parts.fragment:
        raise UsageError(f"{shown}: give the cache's own address, without ? and #")


def public_url(url: str) -> str:
    """Return a URL as it may be printed and stored: without user name, password and query.

    Of what looks like a URL and is none, only the scheme is shown: it may hold a password all the same.
    """
    try:
        parts = split_url(url)
    except UsageError:
        return f"{as_url(url).partition('://')[0]}://…"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def split_url(url: str) -> SplitResult:
    """Return the parts of a URL. Raises: UsageError for one that cannot be parted, or whose port is no number."""
    try:
        parts = urlsplit(as_url(url))
        _ = parts.port
    except ValueError:
        # What Python says of it may hold a password.
        raise UsageError(
            f"{as_url(url).partition('://')[0]}://…: is no URL, by its host or port; expected such as "
            "https://host:8443/path, http://[::1]:8000/path or s3://bucket/prefix: correct the address"
        ) from None
    return parts
