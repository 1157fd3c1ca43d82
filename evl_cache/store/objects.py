"""Where a cache's files come from: a directory, an HTTP server, an S3 bucket. One small interface for reading all.

Names are relative to the cache (or to a place that holds several), with forward slashes.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from evl_cache.errors import UsageError
from evl_cache.store.file_system import check_no_links, open_regular, read_limited

SCHEMES = ("s3", "http", "https")
Data = bytes | bytearray | memoryview
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)


class Objects(Protocol):
    """Files that can be read. `url` is where, without credentials.

    Every method raises FileNotFoundError for a file that is not there, and CacheError for what else is wrong.
    """

    @property
    def url(self) -> str:
        """Where, as it may be shown."""

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """A whole file. Raises: CacheError for one that is larger."""

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """Bytes start .. start+nbytes-1; fewer only where the file ends."""

    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""


class WritableObjects(Objects, Protocol):
    """Files that can be written too, each whole or not at all."""

    def put(self, name: str, data: bytes | Path) -> None:
        """Write or replace a file. Returns once the other side has confirmed its digest."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL and not a directory. A URL that went through `Path` has lost a slash."""
    return _URL.match(str(place)) is not None


def as_url(place: str | Path) -> str:
    """A URL with both its slashes."""
    return _URL.sub(r"\1://", str(place), count=1)


def public_url(url: str) -> str:
    """A URL as it may be printed and stored: without user name, password and query."""
    parts = urlsplit(as_url(url))
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def open_objects(place: str | Path) -> Objects:
    """The files of a directory or URL. Raises: UsageError for a URL that cannot be read from."""
    if not is_url(place):
        return DirectoryObjects(Path(place))
    return _remote()(as_url(place))


def open_writable(url: str) -> WritableObjects:
    """The files of a bucket. Raises: UsageError for a URL that cannot be written to."""
    if urlsplit(as_url(url)).scheme != "s3":
        raise UsageError(
            f"{public_url(url)}: cannot be written to; push to a directory or to s3://bucket/prefix"
        )
    opened: WritableObjects = _remote()(as_url(url))
    return opened


def _remote() -> "Callable[[str], WritableObjects]":
    try:
        from evl_cache.store.remote import RemoteObjects
    except ImportError as error:
        raise UsageError(
            "caches behind URLs need obstore, which is not installed; pip install 'evl-cache[remote]'"
        ) from error
    return RemoteObjects


class DirectoryObjects:
    """A directory's files: regular ones inside it only, no links."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        """The path."""
        return str(self.root)

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """See `Objects`."""
        return read_limited(self._inside(name), most_nbytes)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""
        with open_regular(self._inside(name)) as file:
            file.seek(start)
            return file.read(nbytes)

    def _inside(self, name: str) -> Path:
        path = self.root / name
        check_no_links(self.root, path.parent)
        return path

    def folders(self) -> list[str]:
        """See `Objects`."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
