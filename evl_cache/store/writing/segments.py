"""Segments: parts of the index of a cache that is not complete, so that a job that goes on need not parse all marks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links, is_there, names_in, remove_leftover
from evl_cache.store.disk.publish import is_staging_name, stage_file
from evl_cache.store.format.index_head import SEGMENTS_NAME
from evl_cache.store.format.known_blocks import SEGMENT_BLOCKS, segment_name
from evl_cache.store.format.layout import mark_path
from evl_cache.store.format.marks import Mark, read_mark
from evl_cache.store.writing.index_files import IndexWriter


def write_segment_of(cache_path: Path, spec: CacheSpec, block: int) -> bool:
    """Write the segment that a block belongs to, if all its blocks are marked now and none of it is there.

    It is for speed alone: what cannot be written of it is left out, and a later job makes it.

    Returns: whether it was written.
    """
    first = block // SEGMENT_BLOCKS * SEGMENT_BLOCKS
    stop = min(first + SEGMENT_BLOCKS, spec.num_blocks)
    path = cache_path / segment_name(first, stop)
    if stop - first == spec.num_blocks:
        return False
    with contextlib.suppress(CacheError):
        # From the end: the last blocks of a range are the last that are done.
        are_done = all(is_there(mark_path(cache_path, each)) for each in reversed(range(first, stop)))
        if not are_done or is_there(path):
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


def _marks(cache_path: Path, spec: CacheSpec, blocks: range) -> Iterator[Mark]:
    for block in blocks:
        mark = read_mark(cache_path, block, spec)
        if mark is None:
            raise CacheDamaged(f"{mark_path(cache_path, block)}: is gone")
        yield mark
