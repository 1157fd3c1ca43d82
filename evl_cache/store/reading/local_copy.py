"""A remote cache read where it lies: what is asked for is fetched once and kept on a local disk.

The manifest and the index tell what there is, and nothing is listed; without an index that belongs to the manifest, the
marks tell. A piece (a run of neighbouring samples of one array) is one ranged request; how many samples it has keeps
requests large and below one a sample. Pieces that will be needed are fetched ahead by threads. Every chunk is checked
against what was promised of it when it arrives, and again whenever it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.format.description import (
    CacheDescription,
    parse_description,
    read_group,
)
from evl_cache.store.format.index import Index
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.layout import (
    CLIPS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    array_layouts,
    mark_name,
)
from evl_cache.store.format.limits import clips_limit, file_limit, projections_limit
from evl_cache.store.format.manifest import (
    manifest_digest,
    parse_manifest,
    proved_digest,
    read_beginning,
    read_manifest,
    read_manifest_bytes,
)
from evl_cache.store.format.marks import ShardFiles
from evl_cache.store.format.size import CacheSize
from evl_cache.store.objects.objects import open_objects
from evl_cache.store.reading.attempts import ATTEMPTS, attempts
from evl_cache.store.reading.copy_root import CopyRoot, write_in_copy
from evl_cache.store.reading.index_copy import IndexCopy
from evl_cache.store.reading.sparse_shard import TOUCH_S, SparseShard
from evl_cache.store.reading.totals import size_of_copy
from evl_cache.store.shards.metadata import METADATA_NAME
from evl_cache.store.shards.shard_pool import default_limit

THREADS = 8  # that fetch; a request waits most of its time
_PIECE_NBYTES = 8 << 20
_LEAST_PIECE_SAMPLES = 2  # tokens and maps are two files: with two samples a piece, one request a sample
_SMALL_NBYTES = 256 << 10  # of a sample in one array: not worth leaving layers out

Piece = tuple[str, int, int, int]  # array, block, first chunk, one past the last


class LocalCopy:
    """The copy of one cache. Threads may share it.

    Args:
        url: address of the cache.
        root: where copies lie.

    Attributes:
        path: the copy's directory, in which everything but the data is whole.
        url: address of the cache, as it may be shown.
        index: of the cache; None where marks tell what there is, which are all here then.
        requests: requests made for data, and for rows of the index.
        nbytes: bytes of data fetched.

    Raises: NoCacheHere where there is none; CacheError where it is not complete or cannot be read.
    """

    def __init__(self, url: str, *, root: CopyRoot | None = None) -> None:
        self._given, self._objects = url, open_objects(url)
        self.url = self._objects.url
        self._root = root or CopyRoot()
        self.requests = self.nbytes = 0
        self._files: Mapping[int, ShardFiles] = {}
        self._renew()
        self.index: Index | None = None
        self._index_is_lost = False
        self.path = self._open()

    def serve(self, files: Mapping[int, ShardFiles]) -> None:
        """Serve shards from now on, by block and array, as their marks describe them."""
        self._files = files

    def ensure(self, block: int, names: Iterable[str], chunks: Sequence[int]) -> None:
        """Have chunks (ascending, of one sample) here, in each of the arrays. Wait for what has to be fetched.

        Raises: CacheError where the server fails; CacheDamaged where what comes is not what was written.
        """
        names = tuple(names)
        if self._is_whole(block, names):
            return
        missing = [piece for name in names if (piece := self._missing(name, block, chunks)) is not None]
        for future in [self._fetching(piece) for piece in missing]:
            future.result()
        if not missing:
            self._note_whole(block, names)

    def is_here(self, block: int, names: Iterable[str], chunks: Sequence[int]) -> bool:
        """Whether nothing of these would have to be fetched."""
        names = tuple(names)
        return self._is_whole(block, names) or all(self._missing(n, block, chunks) is None for n in names)

    def prefetch(self, wanted: Iterable[tuple[int, Sequence[int]]], names: Iterable[str]) -> None:
        """Begin to fetch chunks of samples, (block, chunks) each, in each of the arrays."""
        names = tuple(names)
        for block, chunks in wanted:
            if self._is_whole(block, names):
                continue
            for name in names:
                if (piece := self._missing(name, block, chunks)) is not None:
                    self._fetching(piece)

    def refetch(self, name: str, block: int, chunks: Sequence[int]) -> None:
        """Look at chunks that could not be read, and fetch those again that are damaged here."""
        self._whole.clear()
        self._shard(name, block).drop_damaged(chunks)
        self.ensure(block, [name], chunks)

    def end_waits(self) -> None:
        """End what waits for the server, in any thread: it raises WaitEnded."""
        self._objects.end_waits()

    def close(self) -> None:
        """Stop fetching, and let go of files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._renew()

    def _is_whole(self, block: int, names: tuple[str, ...]) -> bool:
        """Whether all of these were seen to be here a moment ago: a later epoch then looks at nothing else."""
        return time.monotonic() < self._whole.get((block, names), 0.0)

    def _note_whole(self, block: int, names: tuple[str, ...]) -> None:
        shards = [self._shards.get((name, block)) for name in names]
        if all(shard is not None and shard.knows(range(len(shard.nbytes))) for shard in shards):
            self._whole[block, names] = time.monotonic() + TOUCH_S

    def _missing(self, name: str, block: int, chunks: Sequence[int]) -> Piece | None:
        shard = self._shards.get((name, block))
        # A file that was removed is whole for those who have it open; reading tells where it is another.
        if shard is None or not shard.knows(chunks):
            shard = self._shard(name, block)
        if shard.has(chunks):
            shard.touch()
            return None
        layers = self._num_layers
        sample_nbytes = int(shard.nbytes.sum()) // max(1, int((shard.nbytes > 0).sum()) // layers)
        if 2 * len(chunks) < layers and sample_nbytes > _SMALL_NBYTES:
            return name, block, chunks[0], chunks[-1] + 1
        samples = max(_LEAST_PIECE_SAMPLES, _PIECE_NBYTES // max(1, sample_nbytes))
        first = chunks[0] // layers // samples * samples * layers
        return name, block, first, min(first + samples * layers, len(shard.nbytes))

    def _fetching(self, piece: Piece) -> Future[None]:
        if self._pid != os.getpid():
            self._renew()
        with self._lock:
            future = self._in_flight.get(piece)
            if future is None:
                future = self._in_flight[piece] = self._pool.submit(self._fetch, piece)
            return future

    def _fetch(self, piece: Piece) -> None:
        try:
            self._fetch_piece(*piece)
        finally:
            with self._lock:
                self._in_flight.pop(piece, None)

    def _fetch_piece(self, name: str, block: int, first: int, stop: int) -> None:
        shard = self._shard(name, block)
        if shard.has([chunk for chunk in range(first, stop) if shard.nbytes[chunk]]):
            return  # it came between the look of whoever asks and this call
        start, nbytes = int(shard.starts[first]), int(shard.starts[stop] - shard.starts[first])
        self._root.make_room(nbytes)
        file_name = self._layouts[name].shard_name(block)
        wrong = None
        for _ in attempts():
            self._count(nbytes)
            try:
                data = self._objects.get_range(file_name, start, nbytes)
            except FileNotFoundError as error:
                raise self._changed(f"{error}") from error
            wrong = shard.first_wrong(first, stop, data)
            if wrong is None:
                shard.write(first, stop, data)
                return
        raise self._changed(f"{self.url}/{file_name}: chunk {wrong} arrives damaged, {ATTEMPTS} times")

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.requests += 1
            self.nbytes += nbytes

    def _changed(self, reason: str) -> CacheError:
        """Return why what the marks promise does not come: another cache is there now, or this one is damaged."""
        with contextlib.suppress(FileNotFoundError, CacheError):
            _, _, named = read_beginning(self._objects, self._spec)
            if (named or self._digest_of(read_manifest_bytes(self._objects, self._spec))) == self._digest:
                return CacheDamaged(f"{reason}; verify the cache where it lies")
        return CacheError(f"{self.url}: changed while it was read ({reason}); run the same command again")

    def _shard(self, name: str, block: int) -> SparseShard:
        key = (name, block)
        shard = self._shards.get(key)
        if shard is not None and not shard.is_gone and len(self._shards) < self._most_open:
            return shard
        record = self._files[block][name]  # which may have to be fetched
        with self._lock:
            shard = self._shards.get(key)
            if shard is None or shard.is_gone:
                layout = self._layouts[name]
                path = layout.shard(self.path, block)
                check_no_links(self.path, path.parent)
                shard = SparseShard(path, record, layout.codec)
                self._shards[key] = shard
            self._shards.move_to_end(key)
            while len(self._shards) > self._most_open:
                self._shards.popitem(last=False)  # closed once no thread uses it
            return shard

    def _renew(self) -> None:
        # Threads do not survive a fork, and their lock may be held.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")
        self._in_flight: dict[Piece, Future[None]] = {}
        self._shards: OrderedDict[tuple[str, int], SparseShard] = OrderedDict()
        self._most_open = default_limit()
        # Until when it need not be looked at again.
        self._whole: dict[tuple[int, tuple[str, ...]], float] = {}

    # What describes the cache

    @property
    def size(self) -> CacheSize:
        """The size of the cache where it lies."""
        return size_of_copy(self.path, self._spec, self.index)

    def index_part(self, start: int, nbytes: int, is_right: Callable[[bytes], bool]) -> bytes:
        """Return bytes of the index that are not here. Raises: CacheDamaged where only the index is; CacheError."""
        if self._index_is_lost:
            raise CacheDamaged(f"{self.url}/{INDEX_NAME}: was removed; evl-cache index makes it again")
        try:
            return self._index_copy.fetch(start, nbytes, is_right)
        except (FileNotFoundError, CacheDamaged) as error:
            found = self._changed(f"{error}")
            # Marks tell from now on, which are asked for one by one.
            self._index_is_lost = isinstance(error, FileNotFoundError) and isinstance(found, CacheDamaged)
            raise found from error

    def keep_mark(self, block: int, file_digest: tuple[int, str]) -> None:
        """Have a block's mark here, of this size and sha256. Raises: CacheError."""
        try:
            self._keep_whole(mark_name(block), file_digest)
        except (NoCacheHere, CacheDamaged) as error:
            raise self._changed(f"{error}") from error

    def _open(self) -> Path:
        """Fetch what describes the cache, as far as it is not here."""
        group = read_group(self._objects)
        description = parse_description(group, f"{self.url}/{METADATA_NAME}")
        self._spec = spec = description.spec
        self._layouts, self._num_layers = array_layouts(spec), len(spec.stored_layers)
        self._digest, written = self._find_manifest()
        self.path = path = self._root.claim(self._digest)
        self._index_copy = IndexCopy(self._objects, spec, path, count=partial(self._count, 0))
        self.index = self._index_copy.open(self._digest, self.index_part)
        if self.index is not None:
            names = _described_files(description)
        else:
            place = f"{self.url}/{MANIFEST_NAME}"
            manifest = parse_manifest(written, spec, place) if written else read_manifest(path, spec)
            names = {name: manifest.files.get(name, (0, "")) for name in _described_files(description)}
            marks = [mark_name(block) for block in range(spec.num_blocks)]
            names |= {name: manifest.files.get(name, (0, "")) for name in marks}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: self._keep_whole(name, names[name]), names))
        write_in_copy(path / METADATA_NAME, group)
        if written is not None:
            write_in_copy(path / MANIFEST_NAME, written)
        return path

    def _find_manifest(self) -> tuple[str, bytes | None]:
        """Return the cache digest and the manifest; None for the manifest where the copy has it.

        The first bytes of the manifest, which name its digest, only say which copy is meant. That copy's own manifest is
        proved against that digest here, and all else against that manifest, so nothing depends on whether those bytes, or
        the rest of the manifest behind them, arrived intact: a wrong digest names no copy, and then all of it is fetched.
        """
        beginning, is_all, named = read_beginning(self._objects, self._spec)
        kept = None if named is None else self._root.kept(named)
        if named is not None and kept is not None and manifest_digest(kept, self._spec) == named:
            return named, None
        written = beginning if is_all else read_manifest_bytes(self._objects, self._spec)
        return self._digest_of(written), written

    def _digest_of(self, written: bytes) -> str:
        place = f"{self.url}/{MANIFEST_NAME}"
        return proved_digest([written], self._spec) or parse_manifest(written, self._spec, place).digest

    def _keep_whole(self, name: str, file_digest: tuple[int, str]) -> None:
        """Fetch a file of this size at most, and sha256, into the copy, unless it is there.

        Raises: CacheError where it is missing, or another.
        """
        (size, sha256), path = file_digest, self.path / name
        with contextlib.suppress(OSError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return
        try:
            content = self._objects.get(name, most_nbytes=min(size, file_limit(name, self._spec)))
        except FileNotFoundError as error:
            raise NoCacheHere(f"{error}, though the manifest names it; push the cache again") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CacheDamaged(
                f"{self.url}/{name}: is not what the manifest says; run the same command again"
            )
        check_no_links(self.path, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_in_copy(path, content)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalCopy, (self._given,)  # opened anew in the other process


def _described_files(description: CacheDescription) -> dict[str, tuple[int, str]]:
    """Return limit and sha256 of the files beside the group document, which names their digests."""
    found = {CLIPS_NAME: (clips_limit(description.spec), description.clips_sha256)}
    if description.spec.recomputes_maps:
        nbytes = projections_limit(description.spec)
        found[PROJECTIONS_NAME] = (nbytes, description.projections_sha256 or "")
    return found
