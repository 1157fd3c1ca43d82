"""A remote cache read where it lies: what is asked for is fetched once and kept on a local disk.

The manifest and the index tell what there is, and nothing is listed; without an index that belongs to the manifest, the
marks tell. `FetchedShards` fetches the data.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged, CacheError, Unreachable, WaitEnded
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
from evl_cache.store.reading.attempts import ATTEMPTS, attempts, once_intact
from evl_cache.store.reading.copy_root import CopyRoot, write_in_copy
from evl_cache.store.reading.fetch_threads import FetchThreads
from evl_cache.store.reading.fetched_shards import THREADS, FetchedShards
from evl_cache.store.reading.index_copy import IndexCopy
from evl_cache.store.reading.totals import size_of_copy
from evl_cache.store.shards.metadata import METADATA_NAME


class LocalCopy:
    """The copy of one cache. Threads may share it.

    Args:
        url: address of the cache.
        root: where copies lie.

    Attributes:
        path: the copy's directory, in which everything but the data is whole.
        url: address of the cache, as it may be shown.
        index: of the cache; None where marks tell what there is, which are all here then.
        shards: fetches the data.

    Raises: NoCacheHere where there is none; CacheError where it is not complete or cannot be read.
    """

    def __init__(self, url: str, *, root: CopyRoot | None = None) -> None:
        self._given, self._objects = url, open_objects(url)
        self.url = self._objects.url
        self._root = root or CopyRoot()
        self.index: Index | None = None
        self._index_is_lost = False
        self.path = self._open()

    @property
    def requests(self) -> int:
        """Requests made for data, and for rows of the index."""
        return self.shards.requests

    @property
    def nbytes(self) -> int:
        """Bytes of data fetched."""
        return self.shards.nbytes

    def serve(self, files: Mapping[int, ShardFiles]) -> None:
        """Serve shards from now on, by block and array, as their marks describe them."""
        self.shards.serve(files)

    def end_waits(self) -> None:
        """End what waits for the server now, in whatever thread: it raises WaitEnded. What is asked for later waits again."""
        self._index_copy.end_waits()
        self.shards.end_waits()

    def close(self) -> None:
        """Stop fetching, without waiting for the server, and let go of files; the next read opens them again."""
        self.end_waits()
        self.shards.let_go()

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

    def _changed(self, reason: str) -> CacheError:
        """Return why what the marks promise does not come: another cache is there now, or this one is damaged.

        Raises: Unreachable, WaitEnded where that cannot be told.
        """
        try:
            _, _, named = read_beginning(self._objects, self._spec)
            if (named or self._digest_of(read_manifest_bytes(self._objects, self._spec))) == self._digest:
                return CacheDamaged(f"{reason}; verify {self.url}, and tell who keeps the cache")
        except (Unreachable, WaitEnded):
            raise
        except (FileNotFoundError, CacheError):  # none that is intact: another one comes
            pass
        return CacheError(f"{self.url}: changed while it was read ({reason}); run the same command again")

    def keep_mark(self, block: int, file_digest: tuple[int, str]) -> None:
        """Have a block's mark here, of this size and sha256. Raises: CacheError."""
        self._keep_whole(mark_name(block), file_digest)

    def damaged(self, error: CacheDamaged) -> CacheDamaged:
        """Return an error of reading; where it is the copy that is damaged, and not the cache, with what to do about that."""
        if str(self.path) not in str(error):
            return error
        found = str(error).rpartition("; ")[0] or str(error)
        return CacheDamaged(
            f"{self.url}: its copy on this disk is damaged ({found}); check the disk, remove {self.path}, then run the same "
            "command again"
        )

    def _open(self) -> Path:
        """Fetch what describes the cache, as far as it is not here."""
        group, description = once_intact(self._read_group)
        self._spec = spec = description.spec
        self._digest, written = once_intact(self._find_manifest)
        self.path = path = self._root.claim(self._digest)
        self.shards = FetchedShards(
            self._objects,
            path,
            layouts=array_layouts(spec),
            num_layers=len(spec.stored_layers),
            root=self._root,
            changed=self._changed,
        )
        self._index_copy = IndexCopy(self._objects, spec, path, count=partial(self.shards.count, 0))
        self.index = self._index_copy.open(self._digest, self.index_part)
        if self.index is not None:
            names = _described_files(description)
        else:
            place = f"{self.url}/{MANIFEST_NAME}"
            manifest = parse_manifest(written, spec, place) if written else read_manifest(path, spec)
            names = {name: manifest.files.get(name, (0, "")) for name in _described_files(description)}
            marks = [mark_name(block) for block in range(spec.num_blocks)]
            names |= {name: manifest.files.get(name, (0, "")) for name in marks}
        self._keep_all(names)
        write_in_copy(path / METADATA_NAME, group)
        if written is not None:
            write_in_copy(path / MANIFEST_NAME, written)
        return path

    def _keep_all(self, names: Mapping[str, tuple[int, str]]) -> None:
        """Have files here, of these sizes at most and sha256. Where one fails, the others are not waited for."""
        threads = FetchThreads(THREADS)
        pending = [threads.submit(partial(self._keep_whole, name, names[name])) for name in names]
        try:
            done, _ = wait(pending, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            threads.drop_waiting()
            self._objects.end_waits()
            raise

    def _read_group(self) -> tuple[bytes, CacheDescription]:
        group = read_group(self._objects)
        return group, parse_description(group, f"{self.url}/{METADATA_NAME}")

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
        for _ in attempts():
            try:
                content = self._objects.get(name, most_nbytes=min(size, file_limit(name, self._spec)))
            except FileNotFoundError as error:
                raise self._changed(f"{error}, though the manifest names it") from error
            if hashlib.sha256(content).hexdigest() == sha256:
                check_no_links(self.path, path.parent)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_in_copy(path, content)
                return
        raise self._changed(f"{self.url}/{name}: is not what the manifest says, {ATTEMPTS} times")

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalCopy, (self._given,)  # opened anew in the other process


def _described_files(description: CacheDescription) -> dict[str, tuple[int, str]]:
    """Return limit and sha256 of the files beside the group document, which names their digests."""
    found = {CLIPS_NAME: (clips_limit(description.spec), description.clips_sha256)}
    if description.spec.recomputes_maps:
        nbytes = projections_limit(description.spec)
        found[PROJECTIONS_NAME] = (nbytes, description.projections_sha256 or "")
    return found
