"""The shards of a remote cache in its copy: each piece of them is fetched when it is asked for, or ahead of that.

A piece (a run of neighbouring samples of one array) is one ranged request; how many samples it has keeps requests large and
below one a sample. Every chunk is checked against what was promised of it when it arrives, and again whenever it is read.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from evl_cache.errors import CacheError, WaitEnded
from evl_cache.store.disk.forks import renew_in_children
from evl_cache.store.format.layout import ArrayLayout
from evl_cache.store.format.marks import ShardFiles
from evl_cache.store.objects.address import Data
from evl_cache.store.objects.objects import Objects
from evl_cache.store.reading.attempts import ATTEMPTS, attempts
from evl_cache.store.reading.copy_root import CopyRoot
from evl_cache.store.reading.fetch_threads import FetchThreads
from evl_cache.store.reading.sparse_shard import SparseShard
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.store.shards.shard_pool import ShardKey, ShardPool

_LOOK_EVERY_S = 0.1
THREADS = 8  # that fetch; a request waits most of its time
_PIECE_NBYTES = 8 << 20
_PIECES_OF_LIMIT = 16  # at least: with fewer, room for one would be made by removing what was just fetched
_LEAST_PIECE_SAMPLES = 2  # tokens and maps are two files: with two samples a piece, one request a sample
_SMALL_NBYTES = 256 << 10  # of a sample in one array: not worth leaving layers out
_AHEAD_SHARE = 8  # of the limit: an eighth of it may be fetched ahead and not be read yet
_AHEAD_S = 60.0  # what nobody has read after so long was fetched for an epoch that ended

Piece = tuple[str, int, int, int]  # array, block, first chunk, one past the last

# All copies of a process together may have so many files open.
_open_shards: weakref.WeakValueDictionary[str, ShardPool[SparseShard]] = weakref.WeakValueDictionary()


class FetchedShards:
    """The shards of one copy. Threads may share it, and a forked process may go on with it.

    Args:
        objects: the remote cache's files.
        path: directory of the copy.
        layouts: of its arrays.
        num_layers: chunks of a sample.
        root: makes room.
        changed: says why what was promised does not come, given how that was noticed.

    Attributes:
        requests: requests made for data, and others that were counted.
        nbytes: bytes of data fetched.
    """

    def __init__(
        self,
        objects: Objects,
        path: Path,
        *,
        layouts: Mapping[str, ArrayLayout],
        num_layers: int,
        root: CopyRoot,
        changed: Callable[[str], CacheError],
    ) -> None:
        self._objects, self._path, self._layouts, self._num_layers = objects, path, layouts, num_layers
        self._root, self._changed = root, changed
        self._arrays = {name: f"{path}/{name}" for name in layouts}
        self._files: Mapping[int, ShardFiles] = {}
        self.requests = self.nbytes = self._times_ended = 0
        self._open = _open_shards.get("all") or _open_shards.setdefault("all", ShardPool())
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        """Begin with no threads, in a forked child."""
        self._lock = threading.Lock()
        self._threads = FetchThreads(THREADS)
        # With how often waits had been ended: who asks after that must not be given a fetch that was.
        self._in_flight: dict[tuple[Piece, int], Future[None]] = {}
        self._ahead: dict[Piece, tuple[float, int]] = {}  # when it was asked for, and what it takes

    def serve(self, files: Mapping[int, ShardFiles]) -> None:
        """Serve shards from now on, by block and array, as their marks describe them."""
        self._files = files

    def count(self, nbytes: int) -> None:
        """Count a request."""
        with self._lock:
            self.requests += 1
            self.nbytes += nbytes

    # What is here

    def find(self, name: str, block: int, chunks: Sequence[int]) -> SparseShard | None:
        """Return a shard that has chunks, held until its `release`; None where they would have to be fetched."""
        shard = self._shard(name, block)
        if not shard.hold():
            return None
        if shard.has(chunks):
            shard.touch()
            return shard
        shard.release()
        return None

    def hold(self, name: str, block: int, chunks: Sequence[int], names: Iterable[str] = ()) -> SparseShard:
        """Return a shard that has chunks (ascending, of one sample), held until its `release`; they are fetched if needed.

        Args:
            names: arrays whose chunks will be asked for next: where something has to be fetched, so are they.

        Raises: CacheError where the server fails; CacheDamaged where what comes is not what was written.
        """
        held = self.find(name, block, chunks)
        if held is None:
            piece = self._piece(name, block, chunks)
            fetching = self._fetching(piece)
            for other in names:
                if other != name and not self.is_here(other, block, chunks):
                    self._fetching(self._piece(other, block, chunks))
            while not fetching.done():  # a signal that comes just before a wait is handled at its end only
                wait((fetching,), timeout=_LOOK_EVERY_S)
            fetching.result()
            # Where others made room at its cost at once, it is held from the moment on when it comes again.
            held = self.find(name, block, chunks) or self._fetch(piece, self._times_ended, hold=True)
            assert held is not None
        if self._ahead:
            self._forget_ahead(self._piece(name, block, chunks))
        return held

    def is_here(self, name: str, block: int, chunks: Sequence[int]) -> bool:
        """Whether nothing of these would have to be fetched."""
        held = self.find(name, block, chunks)
        if held is not None:
            held.release()
        return held is not None

    def prefetch(self, wanted: Iterable[tuple[int, Sequence[int]]], names: Iterable[str]) -> None:
        """Begin to fetch chunks of samples, (block, chunks) each, in each of the arrays, as far as there is room ahead."""
        names = tuple(names)
        for block, chunks in wanted:
            for name in names:
                if not self._shard(name, block).was_here(chunks) and not self.is_here(name, block, chunks):
                    piece = self._piece(name, block, chunks)
                    if not self._may_fetch_ahead(piece):
                        return
                    self._fetching(piece)

    def refetch(self, name: str, block: int, chunks: Sequence[int]) -> None:
        """Look at chunks that could not be read: those that are damaged are fetched when they are asked for again."""
        shard = self._shard(name, block)
        if shard.hold():
            try:
                shard.drop_damaged(chunks)
            finally:
                shard.release()

    def end_waits(self) -> None:
        """End what waits for the server now; what is asked for later waits again."""
        self._times_ended += 1
        self._objects.end_waits()

    def let_go(self) -> None:
        """Let go of open files; the next read opens them again."""
        self._open.close()

    def _shard(self, name: str, block: int) -> SparseShard:
        key = (self._arrays[name], block)
        shard = self._open.find(key)
        if shard is None:
            record = self._files[block][name]  # which may have to be fetched
            shard = self._open.get(key, partial(self._opened, name, record))
        return shard

    def _opened(self, name: str, record: ShardRecord, key: ShardKey) -> SparseShard:
        layout = self._layouts[name]
        return SparseShard(layout.shard(self._path, key[1]), record, layout.codec, copy=self._path)

    # What is fetched

    def _piece(self, name: str, block: int, chunks: Sequence[int]) -> Piece:
        shard, layers = self._shard(name, block), self._num_layers
        sample_nbytes = int(shard.nbytes.sum()) // max(1, int((shard.nbytes > 0).sum()) // layers)
        if 2 * len(chunks) < layers and sample_nbytes > _SMALL_NBYTES:
            return name, block, chunks[0], chunks[-1] + 1
        piece_nbytes = min(_PIECE_NBYTES, self._root.limit_nbytes // _PIECES_OF_LIMIT)
        samples = max(_LEAST_PIECE_SAMPLES, piece_nbytes // max(1, sample_nbytes))
        first = chunks[0] // layers // samples * samples * layers
        return name, block, first, min(first + samples * layers, len(shard.nbytes))

    def _fetching(self, piece: Piece) -> Future[None]:
        with self._lock:
            asked = piece, self._times_ended
            future = self._in_flight.get(asked)
            if future is None:
                future = self._in_flight[asked] = self._threads.submit(partial(self._fetch_in_flight, *asked))
            return future

    def _fetch_in_flight(self, piece: Piece, times_ended: int) -> None:
        try:
            self._fetch(piece, times_ended)
        finally:
            with self._lock:
                self._in_flight.pop((piece, times_ended), None)

    def _fetch(self, piece: Piece, times_ended: int, *, hold: bool = False) -> SparseShard | None:
        """Fetch a piece unless it is here, and keep it; return its shard, held, where that is asked for."""
        name, block, first, stop = piece
        shard = self._shard(name, block)
        there = [chunk for chunk in range(first, stop) if shard.nbytes[chunk]]
        if (held := self.find(name, block, there)) is None:
            data = self._data_of(piece, shard, times_ended)
            # Fetched bytes lie in memory until there is room for them.
            with self._root.room(shard.room_for(first, stop)) as written:
                written(shard.write(first, stop, data, hold=hold))
            return shard if hold else None
        if hold:
            return held
        held.release()  # it came between the look of whoever asks and this call
        return None

    def _data_of(self, piece: Piece, shard: SparseShard, times_ended: int) -> Data:
        name, block, first, stop = piece
        start, nbytes = int(shard.starts[first]), int(shard.starts[stop] - shard.starts[first])
        file_name = self._layouts[name].shard_name(block)
        wrong = None
        for _ in attempts():
            if self._times_ended != times_ended:
                raise WaitEnded(
                    f"{self._objects.url}/{file_name}: was not waited for; run the same command again"
                )
            self.count(nbytes)
            try:
                data = self._objects.get_range(file_name, start, nbytes)
            except FileNotFoundError as error:
                raise self._changed(f"{error}") from error
            wrong = shard.first_wrong(first, stop, data)
            if wrong is None:
                return data
        raise self._changed(
            f"{self._objects.url}/{file_name}: chunk {wrong} arrives damaged, {ATTEMPTS} times"
        )

    def _may_fetch_ahead(self, piece: Piece) -> bool:
        """Note a piece that is fetched ahead; False where too much is that nobody has read yet, which it would push out."""
        shard, now = self._shard(piece[0], piece[1]), time.monotonic()
        nbytes = shard.room_for(piece[2], piece[3])
        with self._lock:
            for old in [old for old, (asked, _) in self._ahead.items() if asked < now - _AHEAD_S]:
                del self._ahead[old]
            self._ahead.pop(piece, None)
            if (
                nbytes + sum(size for _, size in self._ahead.values())
                > self._root.limit_nbytes // _AHEAD_SHARE
            ):
                return False
            self._ahead[piece] = (now, nbytes)
            return True

    def _forget_ahead(self, piece: Piece) -> None:
        with self._lock:
            self._ahead.pop(piece, None)
