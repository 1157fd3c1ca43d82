"""Digests and checksums, of bytes and of whole files."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from awscrt import checksums
from awscrt.checksums import crc32c as _crc32c

from evl_cache.store.disk.file_system import again_if_stale, disk_error, open_regular

# Not in every awscrt that is accepted.
_combine: Any = getattr(checksums, "combine_crc32c", None)

Buffer = bytes | bytearray | memoryview | np.ndarray[Any, Any]
_PART_NBYTES = 1 << 20  # read and checked while it is in the processor's cache
_LARGE_PART_NBYTES = 4 << 20


def content_digest(content: bytes) -> tuple[int, str]:
    """Return size and sha256 (hexadecimal) of bytes, as `file_digest` does of a file."""
    return len(content), hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> tuple[int, str]:
    """Return size in bytes and sha256 (hexadecimal) of a file. Raises CacheError where it cannot be read."""
    return read_whole(path)[:2]


class WholeFile(NamedTuple):
    """A file that was read from its beginning to its end.

    Attributes:
        size: in bytes.
        sha256: hexadecimal.
        end: its last bytes.
    """

    size: int
    sha256: str
    end: bytes


def read_whole(
    path: Path, *, end_nbytes: int = 0, on_part: Callable[[int], None] = lambda nbytes: None
) -> WholeFile:
    """Return size, sha256 and the last `end_nbytes` bytes of a file, read in large parts with the next one asked for.

    Args:
        on_part: called after each part with its size; what it raises ends the reading.

    Raises: CacheError where it cannot be read.
    """

    def read() -> WholeFile:
        digest, size, end = hashlib.sha256(), 0, b""
        with open_regular(path) as file:
            # Many threads that hash small parts wait for the interpreter, which only one has at a time.
            part = memoryview(bytearray(min(_LARGE_PART_NBYTES, os.fstat(file.fileno()).st_size + 1)))
            while count := _read_part(file, part, size):
                found = part[:count]
                digest.update(found)
                size += count
                if end_nbytes:
                    end = (end + bytes(found[-end_nbytes:]))[-end_nbytes:]
                on_part(count)
        return WholeFile(size, digest.hexdigest(), end)

    try:
        return again_if_stale(read)
    except OSError as error:
        raise disk_error("read", path, error) from error


def _read_part(file: io.FileIO, part: memoryview, offset: int) -> int:
    if len(part) == _LARGE_PART_NBYTES and hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), offset + len(part), len(part), os.POSIX_FADV_WILLNEED)
    return file.readinto(part)


def file_crc32c(path: Path) -> tuple[int, int]:
    """Return size in bytes and CRC-32C of a file: ten times as fast as `file_digest`, against accidents only.

    Raises CacheError where it cannot be read.
    """

    def check() -> tuple[int, int]:
        size = checksum = 0
        part = np.empty(_PART_NBYTES, np.uint8)
        with open_regular(path) as file:
            while count := file.readinto(part.data):
                size += count
                checksum = crc32c(part[:count], checksum)
        return size, checksum

    try:
        return again_if_stale(check)
    except OSError as error:
        raise disk_error("read", path, error) from error


def crc32c(data: Buffer, previous: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of a contiguous buffer, in 0 .. 2^32-1.

    `previous` is the checksum of what comes before the buffer.
    """
    return int(_crc32c(data, previous))


def longer_crc32c(previous: int, data: memoryview, checksum: int | None) -> int:
    """Return the CRC-32C of bytes whose checksum is `previous` and then `data`, whose own is `checksum` where known.

    Knowing it saves a pass over the data.
    """
    if checksum is None or _combine is None:
        return crc32c(data, previous)
    return int(_combine(previous, checksum, data.nbytes))
