"""Digests and checksums, of bytes and of whole files."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from awscrt import checksums
from awscrt.checksums import crc32c as _crc32c

from evl_cache.store.disk.file_system import again_if_stale, disk_error, open_regular

# Not in every awscrt that is accepted.
_combine: Any = getattr(checksums, "combine_crc32c", None)

Buffer = bytes | bytearray | memoryview | np.ndarray[Any, Any]
_PART_NBYTES = 1 << 20  # read and checked while it is in the processor's cache


def content_digest(content: bytes) -> tuple[int, str]:
    """Return size and sha256 (hexadecimal) of bytes, as `file_digest` does of a file."""
    return len(content), hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> tuple[int, str]:
    """Return size in bytes and sha256 (hexadecimal) of a file. Raises CacheError where it cannot be read."""

    def digest() -> tuple[int, str]:
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest

    try:
        return again_if_stale(digest)
    except OSError as error:
        raise disk_error("read", path, error) from error


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
