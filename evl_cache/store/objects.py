"""Where a cache's files come from: a directory, an HTTP server, an S3 bucket. One small interface for reading all.

Names are relative to the cache (or to a place that holds several), with forward slashes.
"""

import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from evl_cache.errors import CacheError, UsageError

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
        return read_limited(self.root / name, most_nbytes)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""
        with _opened(self.root / name) as file:
            file.seek(start)
            return file.read(nbytes)

    def folders(self) -> list[str]:
        """See `Objects`."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())


def read_limited(path: Path, most_nbytes: int) -> bytes:
    """A regular file's bytes; never those of a link, a pipe or a device.

    Raises: OSError as opening does; CacheError where it is no regular file, or larger.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most_nbytes else file.read(most_nbytes + 1)
    if size > most_nbytes or len(content) > most_nbytes:
        raise CacheError(
            f"{path}: has {size} bytes, expected at most {most_nbytes}; it is no file of a cache"
        )
    return content


def _opened(path: Path) -> io.FileIO:
    # Not blocking: a pipe would wait for a writer for ever.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise CacheError(
                f"{path}: is a link; a cache holds plain files only: copy what it leads to"
            ) from error
        raise
    file = io.FileIO(descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise CacheError(f"{path}: is no regular file; a cache holds plain files only")
    return file
