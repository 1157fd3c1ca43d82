"""Where a cache's files come from: a directory, an HTTP server, an S3 bucket. One small interface for reading all.

Names are relative to the cache (or to a place that holds several), with forward slashes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from evl_cache.errors import UsageError
from evl_cache.store.disk.file_system import check_no_links, open_regular, read_limited
from evl_cache.store.objects.address import Data, as_url, is_url, public_url


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
        from evl_cache.store.objects.obstore_objects import RemoteObjects
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
