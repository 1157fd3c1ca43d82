"""Writing the index of a complete cache, and segments while it grows. Both are made of marks, and of nothing else."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.format.index import IndexedBlock
from evl_cache.store.format.index_head import (
    CLIP,
    HEAD_NBYTES,
    LABEL,
    MARK,
    MOST_TEXTS_NBYTES,
    NONE,
    ROW_SUM,
    SOURCE,
    Table,
    index_head,
    packed_digest,
    packed_row,
)
from evl_cache.store.format.marks import ClipRecord, Mark


class NotIndexable(CacheError):
    """A mark has numbers that no index can hold. Ours have none; a cache without an index is read by its marks."""


class Sink(Protocol):
    """Where an index goes: a `StagedFile` that is new, and published by the caller after `finish`."""

    size: int

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def write_over(self, data: bytes) -> None:
        """Write over the first bytes."""


class IndexWriter:
    """Writes an index block by block, in their order; the same marks give the same bytes."""

    def __init__(self, staged: Sink, spec: CacheSpec, *, first: int) -> None:
        self._staged, self._spec, self._first = staged, spec, first
        self._marks: list[Table] = []
        self._clips: list[Table] = []
        self._sources: list[Table] = []
        self._row_sums: list[int] = []
        self._texts: dict[str, int] = {}
        staged.write(bytes(HEAD_NBYTES))

    def add(self, found: Mark | IndexedBlock) -> None:
        """Add the next block. Raises: NotIndexable; CacheError where the disk refuses."""
        try:
            if isinstance(found, Mark):
                self._add_clips(found.clips)
            else:
                self._clips.append(self._with_own_texts(found))
                self._sources.append(found.sources)
            row = packed_row(found.files, self._spec) if isinstance(found, Mark) else found.row
            nbytes = sum(record.size for record in found.files.values())
            size, sha256 = found.file_digest
            mark = (list(packed_digest(found.digest)), list(packed_digest(sha256)), size, nbytes)
            self._marks.append(np.array([mark], MARK))
        except (ValueError, OverflowError, TypeError) as error:
            raise NotIndexable(f"block {found.block}: its mark cannot be indexed ({error})") from error
        self._row_sums.append(crc32c(row))
        self._staged.write(row)

    def finish(self, *, cache_digest: str | None, labels: Table | None = None) -> None:
        """Write what comes after the rows, and the head.

        Args:
            cache_digest: of the manifest; None for a segment.
            labels: of all clips, for an index.

        Raises: NotIndexable where there is no block, or too much text.
        """
        if not self._marks:
            raise NotIndexable("no block can be indexed")
        sections = {"rows": (HEAD_NBYTES, self._staged.size - HEAD_NBYTES, "")}
        contents = {
            "sources": np.concatenate(self._sources).tobytes(),
            "marks": np.concatenate(self._marks).tobytes(),
            "clips": np.concatenate(self._clips).tobytes(),
            "labels": b"" if labels is None else labels.astype(LABEL).tobytes(),
            "row_sums": np.asarray(self._row_sums, ROW_SUM).tobytes(),
            "texts": canonical_json(list(self._texts)),
        }
        if len(contents["texts"]) > MOST_TEXTS_NBYTES:
            raise NotIndexable(f"the reasons of clips that failed have {len(contents['texts'])} bytes")
        for name, content in contents.items():
            sections[name] = (self._staged.size, len(content), hashlib.sha256(content).hexdigest())
            self._staged.write(content)
        stop = self._first + len(self._marks)
        self._staged.write_over(
            index_head(
                self._spec,
                first=self._first,
                stop=stop,
                cache_digest=cache_digest,
                sections=sections,
                nbytes=int(np.concatenate(self._marks)["nbytes"].sum()),
            )
        )

    def _add_clips(self, clips: Sequence[ClipRecord]) -> None:
        self._clips.append(np.array([self._clip(clip) for clip in clips], CLIP))
        self._sources.append(np.array([_source(clip) for clip in clips], SOURCE))

    def _clip(self, clip: ClipRecord) -> tuple[int, ...]:
        height, width = clip.frame_size or (NONE, NONE)
        if clip.frame_size is not None and min(clip.frame_size) < 0:
            raise ValueError(f"frames of {clip.frame_size}")
        rule = NONE if clip.frame_rule is None else clip.frame_rule
        return self._number(clip.error), self._number(clip.decoder), height, width, rule

    def _number(self, text: str | None) -> int:
        return NONE if text is None else self._texts.setdefault(text, len(self._texts))

    def _with_own_texts(self, found: IndexedBlock) -> Table:
        clips = found.clips.copy()
        named = np.stack([clips["error"], clips["decoder"]], axis=1)
        numbers, places = np.unique(named, return_index=True)
        own = np.full(len(found.texts) + 1, NONE, np.int32)  # the last place is that of `NONE`
        for number in numbers[np.argsort(places)].tolist():  # in the order in which a mark's clips name them
            own[number] = self._number(None if number < 0 else found.texts[number])
        clips["error"], clips["decoder"] = own[named[:, 0]], own[named[:, 1]]
        return clips


def _source(clip: ClipRecord) -> tuple[int, int, list[int]]:
    if clip.source_bytes is not None and clip.source_bytes < 0:
        raise ValueError(f"a video of {clip.source_bytes} bytes")
    nbytes = NONE if clip.source_bytes is None else clip.source_bytes
    if clip.source_sha256 is None:
        return nbytes, 0, [0] * 32
    return nbytes, 1, list(packed_digest(clip.source_sha256))
