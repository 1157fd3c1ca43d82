"""A shard file on a local disk whose chunks arrive one after another from elsewhere.

It is a Zarr v3 shard like any other, with every chunk at its final place and a whole index at the end. Between
both lies a byte a chunk that says whether the chunk is there yet. Where it is not, the file has a hole, which no
reader of ours takes for a chunk: chunks of such files are always checked against their mark.

Who reads holds the file meanwhile, by a shared lock on it. Who makes room removes only files that nobody holds, and empties
them under an exclusive lock: the disk has their blocks back at once, whoever else has the file open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.store.disk.file_system import check_no_links, disk_error, link_error
from evl_cache.store.objects.address import Data
from evl_cache.store.reading.staged_files import staged_file
from evl_cache.store.shards.codec import CRC_NBYTES, ChunkCodec, byte_view
from evl_cache.store.shards.shard import ShardReader, ShardRecord
from evl_cache.store.shards.shard_file import LocalFile, ShardFile
from evl_cache.store.shards.shard_index import MISSING, index_content

_HERE = b"\1"
_REMEDY = "free space, set EVL_CACHE_COPY_ROOT to an empty directory on another disk, or a smaller EVL_CACHE_COPY_GB"
# Files are written by huge pages, and so mapped by them: raw reads are then as fast as those of a cache's own files.
_PAGE_NBYTES = 2 << 20
_LEAST_BY_PAGES = 2 * _PAGE_NBYTES  # of smaller pieces, whole pages would take much more room than data
_UNIT_NBYTES = 4096  # in which disks give room
TOUCH_S = 10.0  # how exactly it is known when a file was last used
_SEEN_S = 1.0  # a file that was there so recently is taken to be there still by who only asks ahead


class SparseShard:
    """A shard file that is being filled, by several processes at once: what they write is the same.

    It may not be there yet, be removed at any time while nobody holds it, and come again. Threads may share it; what
    writes, or makes the file, is kept from others by `CopyRoot.room`.

    Args:
        path: where it lies, or will.
        record: what the shard's mark says of it.
        codec: how its chunks are stored.
        copy: directory of the copy, from which no link may lead to it.

    Attributes:
        reader: reads the file that is held, where somebody has put one here.

    Raises: CacheDamaged where the shard is not laid out as ours are.
    """

    def __init__(
        self, path: Path, record: ShardRecord, codec: ChunkCodec, *, copy: Path | None = None
    ) -> None:
        self._descriptor = -1
        self.path, self._codec, self._copy = path, codec, copy or path.parent
        self.nbytes = record.chunk_nbytes.astype(np.int64)
        self.starts = codec.starts(self.nbytes.tolist())
        self._checksums, self._size = record.chunk_checksums, record.size
        self._flags = int(self.starts[-1])
        if self._flags + 16 * len(self.nbytes) + CRC_NBYTES != record.size:
            raise CacheDamaged(f"{path}: its mark says {record.size} bytes, which its chunks do not make up")
        self._size += len(self.nbytes)
        self._known = bytearray(len(self.nbytes))  # chunks that were here already: no call to see it again
        self.reader: ShardReader | None = None
        self._users, self._lock = 0, threading.Lock()
        self._touched, self._seen = time.monotonic(), float("-inf")

    # Holding the file

    def hold(self) -> bool:
        """Keep the file from being removed until `release`, if it is there; return whether it is."""
        with self._lock:
            if self._users == 0 and not (self._is_kept() or self._opens()):
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Let go of the file, which was held."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                _unlock(self._descriptor)

    def close(self) -> None:
        """Close the file unless somebody holds it; then it is closed with the last reference to this."""
        with self._lock:
            if self._users == 0:
                self._let_go()

    def __del__(self) -> None:
        # No lock: nobody else is left, and in a forked child a thread of the parent may hold it for ever.
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def _is_kept(self) -> bool:
        """Lock the open file; whether it is still the one to use. Else it is closed."""
        if self._descriptor < 0:
            return False
        if not _is_shared(self._descriptor):  # somebody is removing it, who may stand still meanwhile
            self._let_go()
            return False
        found = os.fstat(self._descriptor)
        if found.st_nlink and found.st_size == self._size:
            self._seen = time.monotonic()
            return True
        self._let_go()
        return False

    def _opens(self) -> bool:
        check_no_links(self._copy, self.path.parent)
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if self.path.is_symlink():
                raise link_error(self.path) from error
            raise self._refused(error) from error
        self._known = bytearray(len(self.nbytes))
        return self._is_kept()

    def _refused(self, error: OSError) -> CacheError:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return disk_error("open", self.path, error)
        return CacheError(f"cannot write {self.path}: {error.strerror}; {_REMEDY}")

    def _let_go(self) -> None:
        descriptor, self._descriptor, self.reader = self._descriptor, -1, None
        self._seen = float("-inf")
        if descriptor >= 0:
            os.close(descriptor)

    def was_here(self, chunks: Sequence[int]) -> bool:
        """Whether chunks (ascending) were here a moment ago; without a look at the disk, so that they may be gone."""
        return time.monotonic() - self._seen < _SEEN_S and self._knows(chunks)

    # Of a file that is held

    def file_opener(self, *, map_file: bool) -> Callable[[Path], ShardFile]:
        """Return what opens the file that is held, and no other that may have got its name, for a `ShardReader`."""
        return partial(LocalFile, map_file=map_file, descriptor=self._descriptor)

    def has(self, chunks: Sequence[int]) -> bool:
        """Return whether chunks (ascending) are here."""
        first, stop = chunks[0], chunks[-1] + 1
        if self._knows(chunks):
            return True
        flags = os.pread(self._descriptor, stop - first, self._flags + first)
        self._known[first : first + len(flags)] = flags
        return self._knows(chunks)

    def _knows(self, chunks: Sequence[int]) -> bool:
        first, stop = chunks[0], chunks[-1] + 1
        if stop - first == len(chunks):
            return b"\0" not in self._known[first:stop]
        return all(self._known[chunk] for chunk in chunks)

    def touch(self) -> None:
        """Note that the file is in use: others are removed before it."""
        if time.monotonic() - self._touched > TOUCH_S:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def drop_damaged(self, chunks: Sequence[int]) -> None:
        """Say of those chunks that are not as their mark wants them that they are not here.

        Where none is, the rest of the file must be damaged, and it is removed.
        """
        is_right = True
        for chunk in chunks:
            start, stop = int(self.starts[chunk]), int(self.starts[chunk + 1])
            stored = os.pread(self._descriptor, stop - start, start)
            if self.first_wrong(chunk, chunk + 1, stored) is not None:
                is_right = False
                os.pwrite(self._descriptor, b"\0", self._flags + chunk)
                self._known[chunk] = 0
        if is_right:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    # Filling it

    def first_wrong(self, first: int, stop: int, data: Data) -> int | None:
        """Return the first of chunks first .. stop-1 that `data` does not hold as its mark says, or None."""
        view = byte_view(data) if not isinstance(data, bytearray) else byte_view(memoryview(data))
        base = int(self.starts[first])
        if view.nbytes != int(self.starts[stop]) - base:
            return first
        for chunk in range(first, stop):
            start, nbytes = int(self.starts[chunk]) - base, int(self.nbytes[chunk])
            if nbytes and self._codec.checksum(view[start : start + nbytes]) != int(self._checksums[chunk]):
                return chunk
        return None

    def room_for(self, first: int, stop: int) -> int:
        """Return the bytes that chunks first .. stop-1 take on the disk at most, where they make the file too."""
        start, end = int(self.starts[first]), int(self.starts[stop])
        unit = _UNIT_NBYTES if end - start < _LEAST_BY_PAGES else _PAGE_NBYTES
        data = -(-end // unit) * unit - start // unit * unit
        return data + self._tail + (self._size - self._flags) + 4 * _UNIT_NBYTES

    def write(self, first: int, stop: int, data: Data, *, hold: bool = False) -> int:
        """Put chunks first .. stop-1 in their place, in a file that is made where there is none.

        Args:
            hold: hold the file until `release`.

        Returns: bytes that the disk gave for it. Raises: CacheError where the disk refuses.
        """
        is_held = False
        try:
            before = self._hold_or_make()
            is_held = True
            view, start = memoryview(data), int(self.starts[first])
            if len(view) < _LEAST_BY_PAGES:
                self._put(view, start)
            else:
                self._put_by_pages(view, start)
            os.pwrite(self._descriptor, _HERE * (stop - first), self._flags + first)
            taken = os.fstat(self._descriptor).st_blocks * 512 - before
        except BaseException as error:
            if is_held:
                self.release()
            if not isinstance(error, OSError):
                raise
            raise self._refused(error) from error
        if not hold:
            self.release()
        return taken

    def _hold_or_make(self) -> int:
        """Hold the file, made where there is none; return the bytes that it took on the disk before."""
        if self.hold():
            return os.fstat(self._descriptor).st_blocks * 512
        self._make()
        if not self.hold():
            raise CacheError(
                f"{self.path}: is removed as soon as it is made; run the same command again, and end what removes it"
            )
        return 0

    def _put(self, view: memoryview | bytearray, offset: int) -> None:
        while len(view):
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _put_by_pages(self, view: memoryview, start: int) -> None:
        """Write pages that the data fill in part whole where nothing is yet: what is missing comes later."""
        stop = start + len(view)
        for page in range(start // _PAGE_NBYTES * _PAGE_NBYTES, stop, _PAGE_NBYTES):
            first, last = max(page, start), min(page + _PAGE_NBYTES, stop)
            end = min(page + _PAGE_NBYTES, self._flags)
            part: memoryview | bytearray = view[first - start : last - start]
            if (first, last) != (page, end) and os.lseek(self._descriptor, page, os.SEEK_DATA) >= end:
                part, first = bytearray(first - page) + part + bytes(end - last), page
            self._put(part, first)

    @property
    def _tail(self) -> int:
        """Bytes of data before the flags that are written with them, so that all lies in a huge page."""
        return self._flags % _PAGE_NBYTES if self._flags >= _LEAST_BY_PAGES else 0

    def _make(self) -> None:
        """Make the file, without chunks, in place of what has its name. Raises: OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(self.path) as temporary, temporary.open("xb") as file:
            file.seek(self._flags - self._tail)
            file.write(bytes(self._tail + len(self.nbytes)) + self._index())

    def _index(self) -> bytes:
        index = np.full((len(self.nbytes), 2), MISSING, dtype="<u8")
        there = self.nbytes > 0
        index[there, 0], index[there, 1] = self.starts[:-1][there], self.nbytes[there]
        return index_content(index)


# A disk without such locks: files there are removed, but never emptied under who reads them.


def _is_shared(descriptor: int) -> bool:
    """Lock a file against its removal, at once; return False where another has locked it to remove it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _unlock(descriptor: int) -> None:
    try:  # noqa: SIM105 - `suppress` takes as long as the lock, for every array of a sample
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError:
        pass
