"""A cache sent to a bucket: blocks that differ, each one's mark after its data, then the index, the manifest last."""

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere, UsageError
from evl_cache.store.copying.card_file import CARD_NAME, may_replace_card, read_card
from evl_cache.store.copying.index_sending import has_index, send_index, whole_index
from evl_cache.store.copying.source import (
    THREADS,
    OnBlock,
    SourceCache,
    TransferResult,
    open_source,
    read_source_mark,
)
from evl_cache.store.disk.checksum import content_digest, read_whole
from evl_cache.store.disk.file_system import check_no_links, file_identity
from evl_cache.store.format.description import description_files, read_description
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.layout import MANIFEST_NAME, array_layouts, mark_path
from evl_cache.store.format.limits import file_limit, manifest_limit, mark_limit
from evl_cache.store.format.manifest import parse_manifest
from evl_cache.store.format.marks import parse_mark
from evl_cache.store.objects.objects import WritableObjects, open_writable
from evl_cache.store.objects.workers import Workers
from evl_cache.store.writing.publication import check_nothing_lost


def copy_to_bucket(
    cache_path: Path, url: str, *, threads: int = THREADS, on_block: OnBlock = lambda moved: None
) -> TransferResult:
    """Send a cache to `s3://bucket/prefix`: only blocks that differ. Run it again after a kill.

    Arguments and errors as `copy_to_directory`. Readers need the manifest, so an unfinished cache is not read from
    there until it was sent complete.
    """
    source, target = open_source(cache_path), open_writable(url)
    _check_target(source, target)
    card = read_card(source.objects)
    if card is not None and card != read_card(target) and may_replace_card(target):
        target.put(CARD_NAME, card)
    manifest, index = source.written_manifest, whole_index(cache_path, source)
    there = _get(target, MANIFEST_NAME, manifest_limit(source.spec))
    if manifest is None and there is not None:
        raise CacheError(
            f"{target.url} holds a complete cache, {cache_path} has {len(source.blocks)} of {source.spec.num_blocks} "
            "blocks done; nothing was changed: finish extract, then push"
        )
    with Workers(threads, target, name="copy") as workers:
        if manifest is not None and there == manifest:
            if index is not None:  # where ours is damaged, that one may be whole
                send_index(index, target)
            return source.copy_blocks(lambda block: None, workers, place=target.url, on_block=on_block)
        differing = _differing_blocks(source, cache_path, target, there, workers)
        target.delete(MANIFEST_NAME)
        if index is None or not has_index(target, index):
            target.delete(INDEX_NAME)  # it is of another cache, or will be
        for name in description_files(source.spec):
            target.put(name, source.objects.get(name, most_nbytes=file_limit(name, source.spec)))

        def send(block: int) -> int | None:
            return _send_block(source, cache_path, target, block, workers) if block in differing else None

        result = source.copy_blocks(send, workers, place=target.url, on_block=on_block)
    if manifest is not None:
        if source.objects.get(MANIFEST_NAME, most_nbytes=manifest_limit(source.spec)) != manifest:
            raise CacheError(f"{cache_path}: changed while it was sent; run the same command again")
        send_index(index, target)
        target.put(MANIFEST_NAME, manifest)
    return result


def _differing_blocks(
    source: SourceCache, cache_path: Path, target: WritableObjects, there: bytes | None, workers: Workers
) -> set[int]:
    """Return the blocks that are to be sent. Looked at before anything is removed: what is refused leaves all there.

    Args:
        there: the manifest at the target; a cache that has one is complete, and stays so where ours is damaged.

    Raises: RowsAtStake; CacheDamaged where a block cannot be sent.
    """
    known = _marks_there(source, target, there)
    differs = workers.each(partial(_differs, source, target, known), source.blocks)
    found = [block for block, other in zip(source.blocks, differs, strict=True) if other]
    if there is not None:
        for _ in workers.each(lambda block: _check_block(source, cache_path, block, workers), found):
            pass
    return set(found)


def _check_target(source: SourceCache, target: WritableObjects) -> None:
    try:
        found = read_description(target)
    except NoCacheHere:
        return
    if found != source.description:
        differences = source.spec.differences(found.spec)
        reason = f" ({'; '.join(differences[:6])})" if differences else ""
        raise UsageError(f"{target.url} holds another cache{reason}; push to another prefix")


def _marks_there(
    source: SourceCache, target: WritableObjects, manifest: bytes | None
) -> Mapping[str, tuple[int, str]]:
    """Return sizes and sha256s of the marks of a complete cache in a bucket, by name; none of any other.

    A push removes the manifest before it changes anything, so the marks beside a manifest are those that it names.
    """
    with contextlib.suppress(CacheDamaged):
        if manifest is not None:
            return parse_manifest(manifest, source.spec, f"{target.url}/{MANIFEST_NAME}").files
    return {}


def _differs(
    source: SourceCache, target: WritableObjects, known: Mapping[str, tuple[int, str]], block: int
) -> bool:
    """Whether another block, or none, is there. Raises: RowsAtStake where it has features that would be lost.

    Args:
        known: the marks there, as far as they are known without a request each.
    """
    written, mark = read_source_mark(source, block)
    name = mark_path(Path(), block).as_posix()
    if known.get(name) == content_digest(written):
        return False
    there = _get(target, name, mark_limit(source.spec))
    if there == written:
        return False
    with contextlib.suppress(CacheDamaged):  # what is no mark of this block promises nothing
        found = parse_mark(there or b"", f"{target.url}/{name}", block, source.spec)
        check_nothing_lost(
            mark.clips, [clip.error is None for clip in found.clips], place=target.url, block=block
        )
    return True


def _check_block(source: SourceCache, cache_path: Path, block: int, workers: Workers) -> None:
    """Raises: CacheDamaged where the block here cannot be sent."""
    _, mark = read_source_mark(source, block)
    for array, layout in array_layouts(source.spec).items():
        _check_shard(cache_path, layout.shard(Path(), block), mark.files[array].digest, workers)


def _send_block(
    source: SourceCache, cache_path: Path, target: WritableObjects, block: int, workers: Workers
) -> int:
    """Send a block. Returns: bytes sent."""
    written, mark = read_source_mark(source, block)
    name = mark_path(Path(), block).as_posix()
    target.delete(name)
    for array, layout in array_layouts(source.spec).items():
        _send_shard(cache_path, layout.shard(Path(), block), mark.files[array].digest, target, workers)
    target.put(name, written)
    return sum(record.size for record in mark.files.values())


def _check_shard(
    cache_path: Path, name: Path, promised: tuple[int, str], workers: Workers
) -> tuple[int, int]:
    """Return which file a shard is. Raises: CacheDamaged where it is not what its mark promises."""
    file = cache_path / name
    check_no_links(cache_path, file)
    identity = file_identity(file)
    if identity is None or read_whole(file, on_part=workers.check)[:2] != promised:
        raise CacheDamaged(
            f"{file}: its bytes are not those its mark promises; repair the cache, then push again"
        )
    return identity


def _send_shard(
    cache_path: Path, name: Path, promised: tuple[int, str], target: WritableObjects, workers: Workers
) -> None:
    file, before = cache_path / name, _check_shard(cache_path, name, promised, workers)
    target.put(name.as_posix(), file)  # S3 compares sha256 digests of what arrives
    if file_identity(file) != before or file.stat().st_size != promised[0]:
        raise CacheError(f"{file}: changed while it was sent; run the same command again")


def _get(target: WritableObjects, name: str, most_nbytes: int) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return target.get(name, most_nbytes=most_nbytes)
    return None
