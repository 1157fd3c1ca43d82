"""Writing the index of a complete cache, and segments while it grows. Both are made of marks, and of nothing else."""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import crc32c
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links, is_there, names_in, remove_leftover
from evl_cache.store.disk.publish import AlreadyPublished, StagedFile, is_staging_name, stage_file
from evl_cache.store.format.index import IndexedBlock
from evl_cache.store.format.index_head import (
    CLIP,
    HEAD_NBYTES,
    LABEL,
    MARK,
    NONE,
    ROW_SUM,
    SEGMENTS_NAME,
    SOURCE,
    Table,
    index_head,
    packed_digest,
    packed_row,
)
from evl_cache.store.format.known_blocks import segment_name
from evl_cache.store.format.layout import mark_path
from evl_cache.store.format.marks import ClipRecord, Mark, read_mark

SEGMENT_BLOCKS = (
    256  # enough that a large cache has few, and few enough that most blocks of one at work are in one
)


class NotIndexable(CacheError):
    """A mark has numbers that no index can hold. Ours have none; a cache without an index is read by its marks."""


class IndexWriter:
    """Writes an index into a staged file, block by block in their order; the same marks give the same bytes.

    Args:
        staged: new; published by the caller after `finish`.
    """

    def __init__(self, staged: StagedFile, spec: CacheSpec, *, first: int) -> None:
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
            row = packed_row(found.files, self._spec)
            nbytes = sum(record.size for record in found.files.values())
            size, sha256 = found.file_digest
            mark = (list(packed_digest(found.digest)), list(packed_digest(sha256)), size, nbytes)
            self._marks.append(np.array([mark], MARK))
        except (ValueError, OverflowError, TypeError) as error:
            raise NotIndexable(f"block {found.block}: its mark cannot be indexed ({error})") from error
        self._row_sums.append(crc32c(row))
        self._staged.write(row)

    def finish(
        self,
        *,
        cache_digest: str | None,
        labels: Table | None = None,
        totals: tuple[int, int] | None = None,
    ) -> None:
        """Write what comes after the rows, and the head.

        Args:
            cache_digest: of the manifest; None for a segment.
            labels: of all clips, for an index.
            totals: number and bytes of all files that the manifest names, likewise.
        """
        sections = {"rows": (HEAD_NBYTES, self._staged.size - HEAD_NBYTES, "")}
        contents = {
            "sources": np.concatenate(self._sources).tobytes(),
            "marks": np.concatenate(self._marks).tobytes(),
            "clips": np.concatenate(self._clips).tobytes(),
            "labels": b"" if labels is None else labels.astype(LABEL).tobytes(),
            "row_sums": np.asarray(self._row_sums, ROW_SUM).tobytes(),
            "texts": canonical_json(list(self._texts)),
        }
        for name, content in contents.items():
            self._staged.write(bytes(-self._staged.size % 8))
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
                totals=totals,
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


def write_segment_of(cache_path: Path, spec: CacheSpec, block: int) -> bool:
    """Write the segment that a block belongs to, if all its blocks are marked now and none of it is there.

    It is for speed alone: what cannot be written of it is left out, and a later job makes it.

    Returns: whether it was written.
    """
    first = block // SEGMENT_BLOCKS * SEGMENT_BLOCKS
    stop = min(first + SEGMENT_BLOCKS, spec.num_blocks)
    path = cache_path / segment_name(first, stop)
    # From the end: the last blocks of a range are the last that are done.
    if stop - first == spec.num_blocks or not all(
        is_there(mark_path(cache_path, each)) for each in reversed(range(first, stop))
    ):
        return False
    with contextlib.suppress(AlreadyPublished, CacheError):
        if is_there(path):
            return False
        make_directories(path.parent)
        check_no_links(cache_path, path.parent)
        with stage_file(path.parent) as staged:
            writer = IndexWriter(staged, spec, first=first)
            for mark in _marks(cache_path, spec, range(first, stop)):
                writer.add(mark)
            writer.finish(cache_digest=None)
            staged.publish(path)
            return True
    return False


def remove_segments(cache_path: Path) -> None:
    """Remove the segments, and staged ones: the index has what they have."""
    directory = cache_path / SEGMENTS_NAME
    check_no_links(cache_path, directory)
    for name in names_in(directory):
        if name.endswith(".bin") or is_staging_name(name):
            remove_leftover(directory / name)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _marks(cache_path: Path, spec: CacheSpec, blocks: Iterable[int]) -> Iterable[Mark]:
    for block in blocks:
        mark = read_mark(cache_path, block, spec)
        if mark is None:
            raise CacheDamaged(f"{mark_path(cache_path, block)}: is gone")
        yield mark
