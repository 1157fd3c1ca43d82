"""A cache becomes complete: its index is written, then its manifest."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.disk.file_system import remove_file, remove_leftover
from evl_cache.store.disk.publish import StagedFile, stage_file
from evl_cache.store.format.description import read_clips, read_description
from evl_cache.store.format.index import IndexedBlock, believed_index
from evl_cache.store.format.index_head import INDEX_NAME, Table
from evl_cache.store.format.known_blocks import KnownBlocks
from evl_cache.store.format.layout import MANIFEST_NAME, blocks_in_redo
from evl_cache.store.format.limits import manifest_limit
from evl_cache.store.format.manifest import BlockNotDone, block_files, find_manifest, manifest_content
from evl_cache.store.format.marks import Mark, read_mark, read_mark_bytes
from evl_cache.store.writing.index_files import IndexWriter, NotIndexable

_Files = dict[str, tuple[int, str]]
_Found = Mark | IndexedBlock


def write_manifest(
    cache_path: Path, spec: CacheSpec, *, before_writing: Callable[[], None] = lambda: None
) -> str:
    """Write the manifest of a complete cache, and its index; where both lie there as they would be written, they stay.

    Args:
        before_writing: called when all marks are read; what it raises ends the work.

    Returns: the cache digest.
    Raises: BlockNotDone; CacheDamaged where a mark is not intact; UsageError for a manifest that no reader takes.
    """
    if (there := settled_digest(cache_path, spec)) is not None:
        return there
    with stage_file(cache_path) as staged, stage_file(cache_path) as staged_manifest:
        known = KnownBlocks(cache_path, spec)
        files, writer = _indexed(staged, spec, _done_blocks(cache_path, spec, known.read))
        content, manifest = manifest_content(cache_path, spec, files)
        if len(content) > manifest_limit(spec):  # the cache was begun before this was checked then
            raise UsageError(
                f"{cache_path}: its manifest would have {len(content)} bytes, and no reader takes more than "
                f"{manifest_limit(spec)}; split the list of clips into several caches, and copy features with --reuse"
            )
        is_indexed = _finish_index(writer, manifest.digest, _labels(cache_path, spec))
        if is_indexed:
            staged.seal()
        staged_manifest.write(content)
        staged_manifest.seal()
        # All that takes long is behind: a job that was paused in it does not write what is older than another's marks.
        before_writing()
        if is_indexed:
            staged.publish_replacing(cache_path / INDEX_NAME)
        else:
            remove_leftover(cache_path / INDEX_NAME)
        staged_manifest.publish_replacing(cache_path / MANIFEST_NAME)
    return manifest.digest


def _finish_index(writer: IndexWriter | None, cache_digest: str, labels: Table | None) -> bool:
    """Write the end of an index. Return whether there is one."""
    with contextlib.suppress(NotIndexable):
        if writer is not None and labels is not None:
            writer.finish(cache_digest=cache_digest, labels=labels)
            return True
    return False


def _indexed(
    staged: StagedFile, spec: CacheSpec, blocks: Iterable[_Found]
) -> tuple[_Files, IndexWriter | None]:
    """Return what the manifest says of all blocks, and the index of them; None where there can be none."""
    writer: IndexWriter | None = IndexWriter(staged, spec, first=0)
    files: _Files = {}  # and not the marks, which take gigabytes for a large cache
    for found in blocks:
        files |= block_files(found, spec)
        try:
            if writer is not None:
                writer.add(found)
        except NotIndexable:
            writer = None
    return files, writer


def settled_digest(cache_path: Path, spec: CacheSpec) -> str | None:
    """Return the cache digest where manifest and index are those of all marks as they lie there; None elsewhere."""
    index = believed_index(cache_path, spec)
    if index is None or blocks_in_redo(cache_path):
        return None
    files: _Files = {}
    with contextlib.suppress(CacheDamaged):
        for block in range(spec.num_blocks):
            written = read_mark_bytes(cache_path, block, spec)
            if written is None or content_digest(written) != index.file_digest(block):
                return None
            files |= block_files(index.block(block), spec)
        if manifest_content(cache_path, spec, files)[1].digest == index.cache_digest:
            return index.cache_digest
    return None


def write_index(
    cache_path: Path, spec: CacheSpec, *, before_writing: Callable[[], None] = lambda: None
) -> str:
    """Write the index of a cache that has its manifest, which stays as it is.

    Arguments and return value as of `write_manifest`.

    Raises: BlockNotDone where there is no manifest; CacheDamaged where marks are not those that it names.
    """
    manifest = find_manifest(cache_path, spec)
    if manifest is None:
        raise BlockNotDone(
            f"{cache_path}: is not complete, so it has no index yet; run the extract command again"
        )
    with stage_file(cache_path) as staged:
        # Of the marks alone: an index that is there, and is to be made again, would give what is wrong with it.
        files, writer = _indexed(
            staged, spec, _done_blocks(cache_path, spec, partial(read_mark, cache_path, spec=spec))
        )
        labels = _labels(cache_path, spec)
        if labels is None or manifest_content(cache_path, spec, files)[1].digest != manifest.digest:
            raise CacheDamaged(
                f"{cache_path}: its files are not those that {MANIFEST_NAME} names; repair the cache"
            )
        if writer is None:
            raise CacheError(f"{cache_path}: has marks that cannot be indexed; it is read by its marks")
        before_writing()
        writer.finish(cache_digest=manifest.digest, labels=labels)
        staged.publish_replacing(cache_path / INDEX_NAME)
    return manifest.digest


def withdraw_index(cache_path: Path) -> None:
    """Remove the index: what completes the cache next makes it of the marks. Raises: CacheError where the disk refuses."""
    remove_file(cache_path / INDEX_NAME)


def _done_blocks(cache_path: Path, spec: CacheSpec, read: Callable[[int], _Found | None]) -> Iterator[_Found]:
    in_redo = blocks_in_redo(cache_path)
    for block in range(spec.num_blocks):
        if block in in_redo:
            raise BlockNotDone(f"{cache_path}: block {block} is being redone; run the same command again")
        found = read(block)
        if found is None:
            raise BlockNotDone(f"{cache_path}: block {block} is not done; run the extract command again")
        yield found


def _labels(cache_path: Path, spec: CacheSpec) -> Table | None:
    """Return the labels of all clips; None where the list is damaged, which `verify` tells: then there is no index."""
    with contextlib.suppress(CacheDamaged):
        return read_clips(cache_path, read_description(cache_path)).labels
    return None
