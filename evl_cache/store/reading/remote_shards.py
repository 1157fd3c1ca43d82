"""Shards on a server, read to their last byte without being kept."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from evl_cache.errors import CacheDamaged
from evl_cache.store.disk.checksum import WholeFile
from evl_cache.store.objects.objects import Objects
from evl_cache.store.reading.attempts import attempts

_PART_NBYTES = 8 << 20  # of one request, and in memory for each thread


class RemoteShards:
    """Reads shards of one cache.

    Args:
        objects: its files on the server.
        root: the directory in which they would lie beside what was brought from there.
    """

    def __init__(self, objects: Objects, root: Path) -> None:
        self.objects, self._root = objects, root

    def read(
        self, path: Path, promised: tuple[int, str], *, end_nbytes: int, on_part: Callable[[int], None]
    ) -> WholeFile:
        """Return what `read_whole` returns of a file, which is read to a byte behind its promised size at most.

        What is not as promised may have been damaged on its way: it is read again, and taken for what lies there once it
        arrives so twice.

        Raises: CacheDamaged where there is none; CacheError where the server fails.
        """
        found: WholeFile | None = None
        for attempt in attempts():
            before = found
            found = self._read(
                path, promised[0], end_nbytes, on_part if attempt == 0 else lambda _: on_part(0)
            )
            if found == before or (found.size, found.sha256) == promised:
                break
        assert found is not None
        return found

    def _read(
        self, path: Path, most_nbytes: int, end_nbytes: int, on_part: Callable[[int], None]
    ) -> WholeFile:
        name, digest, size, end = path.relative_to(self._root).as_posix(), hashlib.sha256(), 0, b""
        while size <= most_nbytes:
            asked = min(_PART_NBYTES, most_nbytes + 1 - size)
            try:
                part = self.objects.get_range(name, size, asked)
            except FileNotFoundError as error:
                raise CacheDamaged(f"{path}: is not there; repair the cache") from error
            digest.update(part)
            size += len(part)
            end = (end + bytes(part[-end_nbytes:]))[-end_nbytes:]
            on_part(len(part))
            if len(part) < asked:  # the file ends
                break
        return WholeFile(size, digest.hexdigest(), end)
