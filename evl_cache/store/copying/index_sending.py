"""The index of a cache that is copied: it goes along where it is whole, and one of another cache does not stay.

Nothing depends on it. A bucket's readers open by it; a directory gets its own, which is made faster with it.
"""

from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, WaitEnded
from evl_cache.store.copying.source import SourceCache
from evl_cache.store.disk.publish import stage_file
from evl_cache.store.format.index import Index, believed_index, open_index
from evl_cache.store.format.index_head import HEAD_NBYTES, INDEX_NAME, index_nbytes, parse_head
from evl_cache.store.objects.objects import Objects, WritableObjects

_PART_NBYTES = 16 << 20


def whole_index(cache_path: Path, source: SourceCache) -> Index | None:
    """Return the index of a complete cache where it is believed and each of its rows is intact."""
    if source.manifest is None:
        return None
    index = believed_index(cache_path, source.spec)
    if index is None or index.cache_digest != source.cache_digest:
        return None
    try:
        for block in range(source.spec.num_blocks):
            index.row(block)
    except CacheDamaged:
        return None
    return index


def send_index(index: Index | None, target: WritableObjects) -> None:
    """Send an index to a bucket unless the same is there; for None, remove one that is there.

    Raises: CacheError where bucket or disk refuse.
    """
    if index is None:
        target.delete(INDEX_NAME)
    elif not has_index(target, index):
        target.put(INDEX_NAME, index.path)


def has_index(objects: Objects, index: Index) -> bool:
    """Whether the same index is there: a head has the digests of all that follows, and files come whole or not at all."""
    try:
        return bytes(objects.get_range(INDEX_NAME, 0, HEAD_NBYTES)) == index.head
    except WaitEnded:
        raise
    except (FileNotFoundError, CacheError):
        return False


def bring_index(source: SourceCache, target: Path) -> None:
    """Put a complete source's index into a directory that has all its blocks, so that finishing need not parse marks.

    It is a help and no more: each of its rows is used only where the mark beside it has the digest that the row names.
    What does not come, or not whole, is made there.
    """
    try:
        there = open_index(target, source.spec)
        if there is None or there.cache_digest != source.cache_digest:
            _bring(source, target)
    except WaitEnded:
        raise
    except (FileNotFoundError, CacheError):
        return


def _bring(source: SourceCache, target: Path) -> None:
    objects, url = source.objects, f"{source.objects.url}/{INDEX_NAME}"
    written = bytes(objects.get_range(INDEX_NAME, 0, HEAD_NBYTES))
    head = parse_head(written, source.spec, url)
    if head["cache_digest"] != source.cache_digest:
        return
    stop = index_nbytes(head)
    with stage_file(target) as staged:
        while staged.size < stop:
            part = objects.get_range(INDEX_NAME, staged.size, min(_PART_NBYTES, stop - staged.size))
            if not len(part):
                return
            staged.write(part)
        staged.publish_replacing(target / INDEX_NAME)
