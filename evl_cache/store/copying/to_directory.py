"""Caches copied into a directory block by block: whole blocks only, their marks after them and the manifest last.

What comes is compared with the digests of the marks before it gets its name, so that half a cache, or a damaged
one, is never taken for whole. A copy that was killed goes on at the file where it was.
"""

import contextlib
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.store.copying.card_file import may_replace_card, read_card, write_card
from evl_cache.store.copying.index_sending import bring_index
from evl_cache.store.copying.source import (
    THREADS,
    OnBlock,
    SourceCache,
    TransferResult,
    open_source,
    read_source_mark,
)
from evl_cache.store.disk.file_system import check_no_links, remove_file
from evl_cache.store.disk.locks import BlockLock, LockWatcher
from evl_cache.store.disk.publish import StagedFile
from evl_cache.store.format.description import read_description
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.layout import (
    LOCKS_NAME,
    MANIFEST_NAME,
    ArrayLayout,
    array_layouts,
    finished_blocks,
    is_in_redo,
    mark_path,
)
from evl_cache.store.format.marks import Mark
from evl_cache.store.format.recomputed import read_projections
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.store.objects.workers import Workers
from evl_cache.store.reading.attempts import once_intact
from evl_cache.store.reading.shard_parts import receive_shard
from evl_cache.store.writing.create import create_cache
from evl_cache.store.writing.finish import finish_cache
from evl_cache.store.writing.publication import BlockPublication, has_digest
from evl_cache.store.writing.staged_block import stage_shard


def _lay_down_as(source: SourceCache, target: Path) -> None:
    """Lay the source's description down at a directory, or find it there. Raises: UsageError for another cache."""
    spec, description = source.spec, source.description
    projections = None
    if spec.recomputes_maps:
        projections = once_intact(
            lambda: read_projections(source.objects, spec, description.projections_sha256)
        )
    create_cache(
        target,
        spec,
        source.clips,
        origin=description.origin,
        created_with=description.created_with,
        projections=projections,
    )
    if read_description(target) != description:
        raise UsageError(
            f"{target} holds a cache of the same features that was made separately; choose another directory"
        )


def copy_to_directory(
    place: str | Path, target: Path, *, threads: int = THREADS, on_block: OnBlock = lambda moved: None
) -> TransferResult:
    """Copy a cache from a directory or URL into a directory: only blocks that differ. Run it again after a kill.

    Args:
        threads: blocks copied at a time.
        on_block: called after each block, with whether it was copied.

    Raises: UsageError where another cache is at `target`; CacheDamaged where what comes is not what the marks
        promise; CacheError where source or disk refuse, or the source changed meanwhile.
    """
    source = open_source(place)
    _lay_down_as(source, target)
    locks = LockWatcher(target / LOCKS_NAME)
    with Workers(threads, source.objects, name="copy") as workers:

        def copy(block: int) -> int | None:
            with locks.wait_for(f"{block:06d}", on_look=workers.check) as lock:
                return _copy_block(source, target, block, lock, workers)

        result = source.copy_blocks(copy, workers, place=str(target), on_block=on_block)
    card, there = read_card(source.objects), DirectoryObjects(target)
    if card is not None and card != read_card(there) and may_replace_card(there):
        write_card(target, card)
    if source.manifest is None:
        if len(finished_blocks(target)) == source.spec.num_blocks:  # it was complete before, and is so again
            finish_cache(target, source.spec)
        return result
    bring_index(source, target)
    if finish_cache(target, source.spec) != source.cache_digest:
        remove_file(target / MANIFEST_NAME)
        remove_file(target / INDEX_NAME)
        raise CacheDamaged(
            f"{source.objects.url}: its files do not make up the cache that its manifest names; repair the cache"
        )
    return result


def _copy_block(
    source: SourceCache, target: Path, block: int, lock: BlockLock, workers: Workers
) -> int | None:
    """Copy a block. Returns: bytes copied, or None where the same block is there."""
    written, mark = read_source_mark(source, block)
    path, layouts = mark_path(target, block), array_layouts(source.spec)
    if (
        not is_in_redo(target, block)
        and DirectoryObjects(target).holds(path.relative_to(target).as_posix(), written)
        and all(
            _has_size(layout.shard(target, block), mark.files[name].size) for name, layout in layouts.items()
        )
    ):
        return None
    publication, nbytes = BlockPublication(target, source.spec, block, lock=lock), 0
    publication.check_nothing_lost(mark)
    with contextlib.ExitStack() as staging:
        staged: dict[str, StagedFile] = {}
        for name, layout in layouts.items():
            shard, promised = layout.shard(target, block), mark.files[name].digest
            check_no_links(target, shard.parent)
            if has_digest(shard, promised):
                continue
            staged[name] = staging.enter_context(stage_shard(target, layout, block, lock=lock))
            _receive(source, layout, mark, staged[name], workers)
            nbytes += promised[0]
            if not publication.is_redo:  # so that a copy that is killed goes on behind this file
                publication.publish_file(name, staged[name])
        if publication.is_redo:
            publication.publish(mark, staged, written=written)
        else:
            publication.publish_mark(mark, written)
    return nbytes


def _receive(
    source: SourceCache, layout: ArrayLayout, mark: Mark, staged: StagedFile, workers: Workers
) -> None:
    name, record = layout.shard_name(mark.block), mark.files[layout.name]
    try:
        receive_shard(source.objects, name, record, layout.codec, staged, check=workers.check)
    except FileNotFoundError as error:
        raise CacheError(f"{error}: the source changed; run the same command again") from error
    except CacheDamaged as error:
        raise source.not_as_promised(name, str(error)) from error


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes
