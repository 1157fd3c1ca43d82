"""One small interface for a cache's files, in a directory, on an HTTP server or in an S3 bucket.

Names are relative to the cache (or to a place that holds several), with forward slashes.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from evl_cache.errors import CacheError, Unreachable, UsageError
from evl_cache.store.disk.file_system import (
    check_no_links,
    disk_error,
    is_refusal,
    open_regular,
    read_limited,
)
from evl_cache.store.objects.address import Data, as_url, check_address, is_url, public_url


class Objects(Protocol):
    """Files that can be read.

    Every method raises FileNotFoundError for a file that is not there, Unreachable where that cannot be told, WaitEnded,
    and CacheError for what else is wrong.

    Attributes:
        url: where the files are, as it may be shown: without credentials.
    """

    url: str

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """Return a whole file. Raises: CacheError for one that is larger."""

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """Return bytes start .. start+nbytes-1; fewer only where the file ends."""

    def folders(self) -> list[str]:
        """Return the names of the folders directly below, sorted."""

    def end_waits(self) -> None:
        """End what waits for the other side now, in whatever thread: it raises WaitEnded. Later calls wait again."""


class WritableObjects(Objects, Protocol):
    """Files that can be written too, each whole or not at all."""

    def put(self, name: str, data: bytes | Path) -> None:
        """Write or replace a file, and return once the other side has confirmed its digest."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""


def open_objects(place: str | Path) -> Objects:
    """Return the files of a directory or URL. Raises: UsageError for a URL that cannot be read from."""
    if not is_url(place):
        return DirectoryObjects(Path(place))
    url = as_url(place)
    return _s3(url) if url.lower().startswith("s3:") else _http(url)


def objects_of(place: Path | Objects) -> Objects:
    """Return the files of a cache that is given as its directory or as its files."""
    return DirectoryObjects(place) if isinstance(place, Path) else place


def open_writable(url: str) -> WritableObjects:
    """Return the files of a bucket. Raises: UsageError for a URL that cannot be written to."""
    if not as_url(url).lower().startswith("s3:"):
        raise UsageError(
            f"{public_url(url)}: cannot be written to; push to a directory or to s3://bucket/prefix"
        )
    return _s3(as_url(url))


def _s3(url: str) -> WritableObjects:
    check_address(url)
    with _telling_what_is_missing():
        from evl_cache.store.objects.s3_objects import S3Objects
    return S3Objects(url)


def _http(url: str) -> Objects:
    check_address(url)
    with _telling_what_is_missing():
        from evl_cache.store.objects.http_objects import HttpObjects
    return HttpObjects(url)


@contextlib.contextmanager
def _telling_what_is_missing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"caches behind URLs need {error.name or 'boto3'}, which is not installed; pip install 'evl-cache[remote]'"
        ) from error


class DirectoryObjects:
    """The files of a directory: regular ones inside it only, no links."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, str(root)

    def get(self, name: str, *, most_nbytes: int) -> bytes:
        """See `Objects`."""
        return read_limited(self.path(name), most_nbytes)

    def get_range(self, name: str, start: int, nbytes: int) -> Data:
        """See `Objects`."""
        path = self.path(name)
        try:
            with open_regular(path) as file:
                file.seek(start)
                return file.read(nbytes)
        except OSError as error:
            if is_refusal(error):
                raise disk_error("read", path, error) from error
            raise

    def holds(self, name: str, content: bytes) -> bool:
        """Whether a file has exactly these bytes; False where there is none, or something else."""
        with contextlib.suppress(OSError, CacheError):
            return self.get(name, most_nbytes=len(content)) == content
        return False

    def path(self, name: str) -> Path:
        """Return where a file is. Raises: CacheError where a link leads out of the directory."""
        path = self.root / name
        check_no_links(self.root, path.parent)
        return path

    def folders(self) -> list[str]:
        """See `Objects`."""
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if _may_be_folder(entry))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise Unreachable(
                f"{self.root}: cannot be listed ({error.strerror}); check its permissions and the disk"
            ) from error

    def end_waits(self) -> None:
        """See `Objects`. Nothing waits here."""


def _may_be_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a directory, or a link to one; so it is where the disk does not tell: whoever looks is told."""
    try:
        return entry.is_dir()
    except OSError as error:
        return is_refusal(error)
