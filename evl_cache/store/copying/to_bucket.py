"""A cache sent to a bucket: blocks that differ, each one's mark after its data, the manifest last."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere, UsageError
from evl_cache.store.copying.card_file import CARD_NAME, read_card
from evl_cache.store.copying.to_directory import (
    THREADS,
    OnBlock,
    SourceCache,
    TransferResult,
    cancelled_on_error,
    open_source,
    read_source_mark,
)
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.format.description import MOST_CLIPS_NBYTES, read_description_from
from evl_cache.store.format.layout import MANIFEST_NAME, array_layouts, mark_path
from evl_cache.store.format.manifest import MOST_MANIFEST_NBYTES, description_files
from evl_cache.store.format.marks import MOST_MARK_NBYTES, FileRecord
from evl_cache.store.objects.objects import WritableObjects, open_writable


def copy_to_bucket(
    path: Path, url: str, *, threads: int = THREADS, on_block: OnBlock = lambda moved: None
) -> TransferResult:
    """Send a cache to `s3://bucket/prefix`: only blocks that differ. Run it again after a kill.

    Arguments and errors as `transfer.copy_to_directory`. Readers need the manifest, so that an unfinished cache is
    not read from there until it was sent complete.
    """
    source, target = open_source(path), open_writable(url)
    _check_target(source, target)
    if (card := read_card(source.objects)) is not None and card != read_card(target):
        target.put(CARD_NAME, card)
    if source.manifest is not None:
        manifest = source.objects.get(MANIFEST_NAME, most_nbytes=MOST_MANIFEST_NBYTES)
        if _get(target, MANIFEST_NAME, MOST_MANIFEST_NBYTES) == manifest:
            for _ in source.blocks:
                on_block(False)
            return _result(source, target, moved=[])
    target.delete(MANIFEST_NAME)
    for name in description_files(source.spec):
        target.put(name, source.objects.get(name, most_nbytes=MOST_CLIPS_NBYTES))

    def send(block: int) -> int | None:
        moved = _send_block(source, path, target, block)
        on_block(moved is not None)
        return moved

    with ThreadPoolExecutor(threads) as pool, cancelled_on_error(pool):
        moved = [nbytes for nbytes in pool.map(send, source.blocks) if nbytes is not None]
    if source.manifest is not None:
        if source.objects.get(MANIFEST_NAME, most_nbytes=MOST_MANIFEST_NBYTES) != manifest:
            raise CacheError(f"{path}: changed while it was sent; run the same command again")
        target.put(MANIFEST_NAME, manifest)
    return _result(source, target, moved=moved)


def _result(source: SourceCache, target: WritableObjects, *, moved: list[int]) -> TransferResult:
    return TransferResult(
        place=target.url,
        blocks=len(source.blocks),
        blocks_moved=len(moved),
        nbytes_moved=sum(moved),
        cache_digest=None if source.manifest is None else source.manifest.digest,
    )


def _check_target(source: SourceCache, target: WritableObjects) -> None:
    try:
        found = read_description_from(target)
    except NoCacheHere:
        return
    if found != source.description:
        differences = source.spec.differences(found.spec)
        reason = f" ({'; '.join(differences[:6])})" if differences else ""
        raise UsageError(f"{target.url} holds another cache{reason}; push to another prefix")


def _send_block(source: SourceCache, path: Path, target: WritableObjects, block: int) -> int | None:
    """Returns: bytes sent, or None where the same block is there."""
    written, mark = read_source_mark(source, block)
    name = mark_path(Path(), block).as_posix()
    there = _get(target, name, MOST_MARK_NBYTES)
    if there == written:
        return None
    if there is not None:
        target.delete(name)
    for array, layout in array_layouts(source.spec).items():
        _send_shard(path, layout.shard(Path(), block), mark.files[array], target)
    target.put(name, written)
    return sum(record.size for record in mark.files.values())


def _send_shard(path: Path, name: Path, record: FileRecord, target: WritableObjects) -> None:
    file = path / name
    check_no_links(path, file)
    before = os.stat(file) if file.is_file() else None
    if before is None or file_digest(file) != (record.size, record.sha256):
        raise CacheDamaged(
            f"{file}: its bytes are not those its mark promises; repair the cache, then push again"
        )
    target.put(name.as_posix(), file)  # S3 compares sha256 digests of what arrives
    after = os.stat(file)
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (
        after.st_ino,
        after.st_mtime_ns,
        after.st_size,
    ):
        raise CacheError(f"{file}: changed while it was sent; run the same command again")


def _get(target: WritableObjects, name: str, most_nbytes: int) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return target.get(name, most_nbytes=most_nbytes)
    return None
