"""Addresses of caches: which are URLs, and how one is shown without its credentials."""

import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

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
    """Return a word of a command line as it may be printed and stored: a URL in it as `public_url` has it."""
    found = _URL_INSIDE.search(text)
    if found is None:
        return text
    try:
        return text[: found.start()] + public_url(text[found.start() :])
    except ValueError:  # no URL, but what looks like one may hold a password all the same
        return f"{text[: found.end()]}…"


def check_address(url: str) -> None:
    """Raises: UsageError for a URL of another kind than a cache may have, or one that cannot be read."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is no number
        shown = public_url(url)
    except ValueError as error:
        raise UsageError(
            f"{public_text(url)}: is no address ({error}); expected https://host/path"
        ) from error
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise UsageError(f"{shown}: expected s3://bucket/prefix, http://host/path or https://host/path")
    if parts.query or parts.fragment:
        raise UsageError(f"{shown}: give the cache's own address, without ? and #")


def public_url(url: str) -> str:
    """Return a URL as it may be printed and stored: without user name, password and query."""
    parts = urlsplit(as_url(url))
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
