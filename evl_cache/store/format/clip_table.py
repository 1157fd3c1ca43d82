"""The clips of a cache as a list over the bytes of `clips.jsonl`: a row is parsed when it is asked for.

A million clips as objects are half a gigabyte and seconds in every process. The bytes are an eighth of that, and where
they are mapped from a local disk, processes share them.
"""

import hashlib
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from json.encoder import encode_basestring as text  # of JSON, which is not only ASCII
from pathlib import Path
from typing import Any, overload

import numpy as np

from evl_cache.canonical_json import canonical_json
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged
from evl_cache.store.disk.file_system import map_limited
from evl_cache.untrusted.json_text import parse_json

_ROWS_AT_A_TIME = 4096  # one call of the parser for many: it takes a third of the time of one each
_BYTES_AT_A_TIME = 4 << 20
_TEXT = rb'"[^"\\\x00-\x1f]*"'
# A line as our writers write it, without escapes: nearly all are so, and it is read in a tenth of the time. Five digits are
# the labels below MAX_CLASSES.
_PLAIN_LINE = re.compile(
    rb'^\{"id":%b,"label":(0|[1-9][0-9]{0,4}),"path":%b,"split":%b\}$' % (_TEXT, _TEXT, _TEXT), re.MULTILINE
)


class ClipTable(Sequence[Clip]):
    """Clips in their order, as rows of `clips.jsonl`. It equals any list or tuple of the same clips.

    Attributes:
        place: where the lines lie, for messages.

    Args:
        lines: the whole file.
        labels: int, the label of each clip, where that is known from elsewhere.
        path: the file on a local disk that `lines` are mapped from; pickled, the table is its name and digest alone.

    Raises: CacheDamaged, and as `Clip.from_json`, when a row is asked for that is no clip.
    """

    def __init__(
        self,
        lines: bytes | mmap.mmap,
        place: str,
        *,
        labels: np.ndarray | None = None,
        path: Path | None = None,
    ) -> None:
        self.place = place
        self._lines, self._path = lines, path
        self._bounds = _line_bounds(lines)
        if labels is not None:
            self.know_labels(labels)
        self.forget_pages()

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, row: int) -> Clip: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[Clip, ...]: ...
    def __getitem__(self, row: int | slice) -> Clip | tuple[Clip, ...]:
        """Return a clip, or those of a slice."""
        if isinstance(row, slice):
            rows = range(len(self))[row]
            if rows.step == 1:
                return tuple(self._clips(rows.start, rows.stop))
            return tuple(self[at] for at in rows)
        row = range(len(self))[row]  # counts from the end, and raises IndexError, as a list does
        return Clip.from_json(self._rows(row, row + 1)[0])

    def __iter__(self) -> Iterator[Clip]:
        """Yield every clip. Many lines are parsed at once, and none of them is kept."""
        return self._clips(0, len(self))

    def __contains__(self, clip: object) -> bool:
        """Whether a clip is in the list."""
        return isinstance(clip, Clip) and any(clip == own for own in self)

    def __eq__(self, other: object) -> bool:
        """Whether another table, list or tuple has the same clips in the same order."""
        if isinstance(other, ClipTable) and self._same_bytes(other):
            return True
        if not isinstance(other, ClipTable | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return how many clips of what file."""
        return f"ClipTable({len(self)} clips of {self.place})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a pickle holds: the bytes, or of a mapped file where it lies, so that processes share it."""
        labels = self.__dict__.get("labels")
        if self._path is None:
            return _table_of_bytes, (self._lines[:], self.place, labels)
        return _table_of_file, (self._path, len(self._lines), self.sha256, self.place, labels)

    @cached_property
    def sha256(self) -> str:
        """The digest of the lines, hexadecimal."""
        found = hashlib.sha256()
        for start in range(0, len(self._lines), _BYTES_AT_A_TIME):
            found.update(self._lines[start : start + _BYTES_AT_A_TIME])
        self.forget_pages()
        return found.hexdigest()

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each clip, int32 (clips,), read-only."""
        labels = np.empty(len(self), dtype=np.int32)
        for start, stop in self._parts():
            found = _PLAIN_LINE.findall(self._part(start, stop))
            if len(found) == stop - start:
                labels[start:stop] = np.array(found, dtype="S5").astype(np.int32)
            else:
                labels[start:stop] = [Clip.from_json(row).label for row in self._rows(start, stop)]
        self.forget_pages()
        return _kept(labels)

    def know_labels(self, labels: np.ndarray) -> None:
        """Take the label of each clip from elsewhere, so that no line is parsed for them."""
        self.__dict__["labels"] = _kept(labels)  # what the cached property would make

    @cached_property
    def rows_by_id(self) -> Mapping[str, int]:
        """The row of each clip by its id: made at the first use, and large."""
        return {clip_id: row for row, clip_id in enumerate(self.ids())}

    def ids(self) -> Iterator[str]:
        """Yield the id of every clip."""
        return (clip.id for clip in self)

    def canonical_parts(self) -> Iterator[bytes]:
        """Yield the lines of the clips as `clips_lines` writes them, some thousand at a time."""
        for start, stop in self._parts():
            lines = self._part(start, stop)
            if len(_PLAIN_LINE.findall(lines)) == stop - start and _is_utf8(lines):
                yield lines + b"\n"
            else:
                yield from canonical_parts(self._clips(start, stop))

    def forget_pages(self) -> None:
        """Give the memory of the pages that were looked at back: the kernel has them, and reads them again if need be."""
        if isinstance(self._lines, mmap.mmap):
            self._lines.madvise(mmap.MADV_DONTNEED)

    def _same_bytes(self, other: "ClipTable") -> bool:
        return len(self._lines) == len(other._lines) and all(
            self._lines[at : at + _BYTES_AT_A_TIME] == other._lines[at : at + _BYTES_AT_A_TIME]
            for at in range(0, len(self._lines), _BYTES_AT_A_TIME)
        )

    def _parts(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        stop = len(self) if stop is None else stop
        return ((at, min(at + _ROWS_AT_A_TIME, stop)) for at in range(start, stop, _ROWS_AT_A_TIME))

    def _part(self, start: int, stop: int) -> bytes:
        """Return lines, without the end of the last one."""
        return self._lines[int(self._bounds[start]) : int(self._bounds[stop]) - 1]

    def _clips(self, start: int, stop: int) -> Iterator[Clip]:
        for first, last in self._parts(start, stop):
            yield from map(Clip.from_json, self._rows(first, last))

    def _rows(self, start: int, stop: int) -> list[Any]:
        """Return rows as JSON has them. Raises: CacheDamaged."""
        try:
            # No string of JSON holds a line break.
            rows = parse_json(b"[" + self._part(start, stop).replace(b"\n", b",") + b"]")
        except ValueError as error:
            raise CacheDamaged(f"{self.place}: is no list of clips ({error}); repair the cache") from error
        if len(rows) != stop - start:
            raise CacheDamaged(
                f"{self.place}: is no list of clips ({len(rows)} of them on {stop - start} lines); repair the cache"
            )
        return list(rows)


def canonical_parts(clips: Iterable[Clip]) -> Iterator[bytes]:
    """Yield what `canonical_json` makes of the rows of clips, some thousand at a time and in a tenth of its time."""
    rest = iter(clips)
    while part := list(islice(rest, _ROWS_AT_A_TIME)):
        rows = (
            f'{{"id":{text(clip.id)},"label":{clip.label:d},"path":{text(clip.path)},{_segment(clip)}"split":{text(clip.split)}}}\n'
            for clip in part
        )
        yield "".join(rows).encode(errors="backslashreplace")


def _segment(clip: Clip) -> str:
    """Return the field of a row that only segments have, and what divides it from the next."""
    return (
        ""
        if clip.segment is None
        else f'"segment":{canonical_json(clip.segment.to_json()).decode().strip()},'
    )


def map_clips(path: Path, most_nbytes: int, *, labels: np.ndarray | None = None) -> ClipTable:
    """Return the clips of a file: mapped where that is sound, else read. Raises: as `map_limited`."""
    lines = map_limited(path, most_nbytes)
    return ClipTable(lines, str(path), labels=labels, path=path if isinstance(lines, mmap.mmap) else None)


def _table_of_bytes(lines: bytes, place: str, labels: np.ndarray | None) -> ClipTable:
    return ClipTable(lines, place, labels=labels)


def _table_of_file(path: Path, nbytes: int, sha256: str, place: str, labels: np.ndarray | None) -> ClipTable:
    try:
        table = map_clips(path, nbytes, labels=labels)
    except OSError as error:
        raise CacheDamaged(f"{place}: cannot be read ({error}); repair the cache") from error
    if table.sha256 != sha256:
        raise CacheDamaged(f"{place}: is not what it was when the cache was opened; open it again")
    return table


def _line_bounds(lines: bytes | mmap.mmap) -> np.ndarray:
    """Return where each line begins, and where one after the last would, int64 (lines + 1,)."""
    ends = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(lines), _BYTES_AT_A_TIME):
        part = np.frombuffer(lines[start : start + _BYTES_AT_A_TIME], dtype=np.uint8)
        ends.append(np.flatnonzero(part == ord("\n")) + (start + 1))
    if len(lines) and lines[len(lines) - 1 :] != b"\n":
        ends.append(np.asarray([len(lines) + 1]))
    bounds = np.concatenate(ends)
    return bounds.astype(np.uint32) if len(lines) < 2**32 - 1 else bounds


def _kept(labels: np.ndarray) -> np.ndarray:
    """Return labels as a table keeps them."""
    kept = np.ascontiguousarray(labels, dtype=np.int32).view()
    kept.flags.writeable = False
    return kept


def _is_utf8(lines: bytes) -> bool:
    try:
        lines.decode()
    except UnicodeDecodeError:
        return False
    return True
