"""The index of a cache: what readers need of all marks, in one file that is read in pieces.

A cache of two million samples has 40,000 marks, more than a gigabyte of JSON. The index holds the same numbers packed. It
is made of the marks and can be made again, so nothing depends on it: readers believe it only where it is intact and
names the digest of the manifest that lies beside it, and go by the marks otherwise. A segment has the same form. It
holds some blocks of an unfinished cache, and each of its rows is believed as long as the block's mark has the digest
that the row names.

The file is a head, in JSON and of fixed size, and sections: a row a block with what `ShardFiles` holds, then small
tables. See docs/cache-format.md.
"""

import contextlib
import errno
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.disk.file_system import check_no_links, disk_error, is_refusal
from evl_cache.store.format.index_file import IndexFile
from evl_cache.store.format.index_head import (
    DTYPES,
    HEAD_NBYTES,
    INDEX_NAME,
    MOST_TEXTS_NBYTES,
    NONE,
    Table,
    check_sections,
    index_damaged,
    index_nbytes,
    parse_head,
    row_nbytes,
    unpacked_row,
)
from evl_cache.store.format.layout import ArrayLayout, array_layouts
from evl_cache.store.format.manifest import manifest_digest
from evl_cache.store.format.marks import ClipRecord, ShardFiles, check_record
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.untrusted.json_text import parse_json

# Brings bytes (start, count) of the file that are as a check wants them, to a copy that has a hole or damage there.
Fetch = Callable[[int, int, Callable[[bytes], bool]], bytes]


@dataclass(frozen=True, kw_only=True)
class IndexedBlock:
    """A block as an index has it: its mark without frame numbers and environment.

    Attributes:
        spec: of the cache.
        block: its number.
        digest: of its mark.
        file_digest: size and sha256 of the mark's file.
        row: what the index has of its files.
        clips: `CLIP`, one a clip of the block.
        sources: `SOURCE`, likewise.
        texts: what `error` and `decoder` of `clips` are numbers of.
    """

    spec: CacheSpec
    block: int
    digest: str
    file_digest: tuple[int, str]
    row: bytes
    clips: Table
    sources: Table
    texts: tuple[str, ...]

    @cached_property
    def files(self) -> ShardFiles:
        """Record of each array's shard, by the array's name."""
        return unpacked_row(self.row, self.spec)

    def records(self, ids: Iterable[str]) -> list[ClipRecord]:
        """Return the records of its clips, whose ids these are, without frame counts and frame numbers."""
        return [
            ClipRecord(
                id=clip_id,
                error=None if error < 0 else self.texts[error],
                decoder=None if decoder < 0 else self.texts[decoder],
                frame_size=None if height < 0 else (height, width),
                frame_rule=None if rule < 0 else rule,
                source_bytes=None if nbytes < 0 else nbytes,
                source_sha256=bytes(sha256).hex() if has_sha256 else None,
            )
            for clip_id, (error, decoder, height, width, rule), (nbytes, has_sha256, sha256) in zip(
                ids, self.clips.tolist(), self.sources.tolist(), strict=True
            )
        ]


class Index:
    """An index that is open for reading, whole as far as its checksums tell. Threads and forked processes may share it.

    Args:
        path: of the file.
        spec: of the cache.
        expected: digest of the head, where only that very index will do.
        fetch: gives what the file lacks, where it is a copy of one behind a URL.
        stays_open: as `IndexFile` takes it.

    Attributes:
        first, stop: its blocks are first .. stop-1.
        cache_digest: of the manifest that it was made with; None for a segment.
        head: its first bytes.
        head_digest: tells this index from any other.
        texts: what `error` and `decoder` of `clips` are numbers of.

    Raises: CacheDamaged where it is not intact, or of another cache; FileNotFoundError; CacheError where the disk refuses.
    """

    def __init__(
        self,
        path: Path,
        spec: CacheSpec,
        *,
        expected: str | None = None,
        fetch: Fetch | None = None,
        stays_open: bool = True,
    ) -> None:
        self.path, self._spec, self._fetch = path, spec, fetch
        self._layouts = array_layouts(spec)
        self._file, self._stays_open = IndexFile(path, stays_open=stays_open), stays_open
        self.head = self._file.read(0, HEAD_NBYTES)
        head = parse_head(self.head, spec, path)
        check_sections(head, spec, path)
        self.head_digest: str = head["digest"]
        if expected not in (None, self.head_digest):
            raise CacheDamaged(f"{path}: is another index than before; run the same command again")
        self.first, self.stop = int(head["first"]), int(head["stop"])
        self.cache_digest: str | None = head["cache_digest"]
        self._places: Mapping[str, tuple[int, int, str]] = head["sections"]
        if (nbytes := index_nbytes(head)) != self._file.size:
            raise self._damaged(f"has {self._file.size} bytes, expected {nbytes}")
        self._tables = {name: self._table(name) for name in ("marks", "clips")}
        # Copies, as these are used for as long as a cache is open, and the file may be cut off meanwhile.
        self._row_sums, self._tables["labels"] = self._table("row_sums").copy(), self._table("labels").copy()
        self.texts = self._read_texts()
        for numbers in (self.clips["error"], self.clips["decoder"]):
            if not NONE <= numbers.min() <= numbers.max() < len(self.texts):
                raise self._damaged("names texts that it does not have")
        self._sources: Table | None = None
        if not stays_open:
            self._file.release()

    @property
    def marks(self) -> Table:
        """A table of `MARK` by block. Raises: CacheDamaged, as do the others."""
        return self._still("marks")

    @property
    def clips(self) -> Table:
        """A table of `CLIP` by clip."""
        return self._still("clips")

    @property
    def labels(self) -> Table:
        """A table of `LABEL` by clip; a segment has none."""
        return self._still("labels")

    @property
    def num_clips(self) -> int:
        """Clips of its blocks."""
        return len(self.clips)

    @property
    def first_clip(self) -> int:
        """Row of the first of them in the clip list."""
        return self.first * self._spec.block_clips

    @property
    def nbytes(self) -> int:
        """Bytes of all shard files of its blocks."""
        return int(self.marks["nbytes"].sum())

    @property
    def sources(self) -> Table:
        """A table of `SOURCE` by clip, which is read when it is first asked for. Raises: CacheDamaged."""
        if self._sources is None:
            start, nbytes, sha256 = self._places["sources"]
            if self._fetch is None:
                self._sources = self._table("sources")
            else:
                written = self._here_or_fetched(
                    start, nbytes, lambda part: hashlib.sha256(part).hexdigest() == sha256
                )
                self._sources = np.frombuffer(written, DTYPES["sources"])
        return self._sources

    def file_digest(self, block: int) -> tuple[int, str]:
        """Return size and sha256 of a block's mark as a file."""
        mark = self.marks[block - self.first]
        return int(mark["size"]), mark["sha256"].tobytes().hex()

    def mark_digest(self, block: int) -> str:
        """Return the digest that a block's mark has in it."""
        found: str = self.marks[block - self.first]["digest"].tobytes().hex()
        return found

    def clips_of(self, block: int) -> Table:
        """Return the part of `clips` that is a block's."""
        return self.clips[self._rows_of(block)]

    def files(self, block: int) -> ShardFiles:
        """Return the records of a block's shards. Raises: CacheDamaged where its row is not intact."""
        found = unpacked_row(self.row(block), self._spec)
        for name, layout in self._layouts.items():
            self._check_record(found[name], layout)
        return found

    def row(self, block: int) -> bytes:
        """Return a block's row as it is stored. Raises: CacheDamaged where it is not intact."""
        nbytes = row_nbytes(self._spec)
        start = self._places["rows"][0] + (block - self.first) * nbytes
        expected = int(self._row_sums[block - self.first])
        if self._fetch is not None:
            return self._here_or_fetched(start, nbytes, lambda part: crc32c(part) == expected)
        row = self._file.read(start, nbytes)
        if crc32c(row) != expected:
            raise self._damaged(f"has a row of block {block} that does not match its CRC-32C")
        return row

    def block(self, block: int) -> IndexedBlock:
        """Return all that it holds of a block. Raises: CacheDamaged."""
        rows = self._rows_of(block)
        return IndexedBlock(
            spec=self._spec,
            block=block,
            digest=self.mark_digest(block),
            file_digest=self.file_digest(block),
            row=self.row(block),
            clips=self.clips[rows],
            sources=self.sources[rows],
            texts=self.texts,
        )

    def text(self, number: int) -> str | None:
        """Return the text that a record names; None for `NONE`."""
        return None if number < 0 else self.texts[number]

    def _rows_of(self, block: int) -> slice:
        clips = self._spec.clips_of_block(block)
        return slice(clips.start - self.first_clip, clips.stop - self.first_clip)

    def _still(self, name: str) -> Table:
        """Return a table, unless the file was cut off since: a page of a map that is behind its end ends the process."""
        self._file.check_size()
        return self._tables[name]

    def _table(self, name: str) -> Table:
        written = self._section(name)
        return np.frombuffer(written, DTYPES[name])

    def _section(self, name: str) -> memoryview:
        start, nbytes, sha256 = self._places[name]
        written = self._file.view(start, nbytes)
        if hashlib.sha256(written).hexdigest() != sha256:
            raise self._damaged(f"has a section of {name} that does not match its digest")
        return written

    def _read_texts(self) -> tuple[str, ...]:
        if self._places["texts"][1] > MOST_TEXTS_NBYTES:
            raise self._damaged("has more text than any that is written")
        try:
            texts = parse_json(bytes(self._section("texts")))
        except ValueError as error:
            raise self._damaged(f"has texts that cannot be read ({error})") from error
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self._damaged("has texts that are none")
        return tuple(texts)

    def _check_record(self, record: ShardRecord, layout: ArrayLayout) -> None:
        try:
            check_record(record, layout, self._spec)
        except ValueError as error:
            raise self._damaged(f"describes files that cannot be ({error})") from error

    def _here_or_fetched(self, start: int, nbytes: int, is_right: Callable[[bytes], bool]) -> bytes:
        assert self._fetch is not None
        with contextlib.suppress(CacheDamaged):  # of a copy that was cut off
            here = self._file.read(start, nbytes)
            if is_right(here):
                return here
        return self._fetch(start, nbytes, is_right)

    def _damaged(self, reason: str) -> CacheDamaged:
        return index_damaged(self.path, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.path, self._spec, self.head_digest, self._fetch, self._stays_open)


def open_index(
    cache_path: Path,
    spec: CacheSpec,
    *,
    name: str = INDEX_NAME,
    fetch: Fetch | None = None,
) -> Index | None:
    """Return an index or segment that lies in a cache; None where there is no intact one of this cache.

    Whether it is to be believed is another question: see `believed_index`.

    Args:
        name: of its file, relative to the cache.
        fetch: as `Index` takes it.

    Raises: CacheError where the disk refuses.
    """
    path = cache_path / name
    try:
        check_no_links(cache_path, path.parent)
        return Index(path, spec, fetch=fetch, stays_open=name == INDEX_NAME)
    except CacheDamaged:
        return None
    except OSError as error:
        if is_refusal(error) and error.errno != errno.ESTALE:
            raise disk_error("read", path, error) from error
        return None


def believed_index(cache_path: Path, spec: CacheSpec) -> Index | None:
    """Return the index of a complete cache; None where there is none that belongs to the manifest. Raises: CacheError."""
    index = open_index(cache_path, spec)
    if index is None or index.cache_digest is None:
        return None
    return index if index.cache_digest == manifest_digest(cache_path, spec) else None


def _opened_again(
    path: Path, spec: CacheSpec, head_digest: str, fetch: Fetch | None, stays_open: bool
) -> Index:
    try:
        return Index(path, spec, expected=head_digest, fetch=fetch, stays_open=stays_open)
    except OSError as error:
        raise CacheDamaged(f"{path}: cannot be read ({error}); open the cache again") from error
