"""The cache that is copied: its files, what describes them, its blocks one after another, and what a copy did."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.format.description import CacheDescription, read_clips, read_description
from evl_cache.store.format.layout import mark_path, marked_blocks
from evl_cache.store.format.limits import mark_limit
from evl_cache.store.format.manifest import BlockNotDone, Manifest, read_beginning, read_complete
from evl_cache.store.format.marks import Mark, parse_mark
from evl_cache.store.objects.objects import DirectoryObjects, Objects, open_objects
from evl_cache.store.objects.workers import Workers
from evl_cache.store.reading.attempts import once_intact

THREADS = 4

OnBlock = Callable[[bool], None]


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What a push or pull did.

    Attributes:
        place: where the cache now is.
        blocks: blocks that are there now.
        blocks_moved: blocks that differed and were copied.
        nbytes_moved: bytes of data files that were copied.
        cache_digest: the copy's; None where the source is not complete.
    """

    place: str
    blocks: int
    blocks_moved: int
    nbytes_moved: int
    cache_digest: str | None


@dataclass(frozen=True, kw_only=True)
class SourceCache:
    """A cache that is copied.

    Attributes:
        objects: its files.
        description: what it says of itself.
        clips: every clip, in order.
        written_manifest: the manifest's bytes; None where the cache is not complete.
        manifest: the same as read.
        blocks: blocks that are done.
    """

    objects: Objects
    description: CacheDescription
    clips: Sequence[Clip]
    written_manifest: bytes | None
    manifest: Manifest | None
    blocks: tuple[int, ...]

    @property
    def spec(self) -> CacheSpec:
        """What the cache holds."""
        return self.description.spec

    @property
    def cache_digest(self) -> str | None:
        """The manifest's digest; None where the cache is not complete."""
        return None if self.manifest is None else self.manifest.digest

    def copy_blocks(
        self, copy_block: Callable[[int], int | None], workers: Workers, *, place: str, on_block: OnBlock
    ) -> TransferResult:
        """Copy every block, several at a time. The first error ends the work.

        Args:
            copy_block: copies a block; returns the bytes copied, or None where the same block is there.
            workers: threads that copy.
            place: where the copy is.
            on_block: called after each block, with whether it was copied.
        """

        def copy(block: int) -> int | None:
            nbytes = copy_block(block)
            on_block(nbytes is not None)
            return nbytes

        moved = [nbytes for nbytes in workers.each(copy, self.blocks) if nbytes is not None]
        return TransferResult(
            place=place,
            blocks=len(self.blocks),
            blocks_moved=len(moved),
            nbytes_moved=sum(moved),
            cache_digest=self.cache_digest,
        )

    def not_as_promised(self, name: str, reason: str) -> CacheError:
        """Return why a file is not what mark or manifest promise: another cache is there by now, or this one is damaged."""
        place = f"{self.objects.url}/{name}: {reason}"
        if self.written_manifest is None:
            remedy = "the source changed, or is damaged; run the same command again, or repair the cache"
            return CacheDamaged(f"{place}: {remedy}")
        with contextlib.suppress(BlockNotDone):
            beginning, _, _ = read_beginning(self.objects, self.spec)
            if self.written_manifest.startswith(beginning):
                return CacheDamaged(f"{place}, and the cache has not changed meanwhile; repair the cache")
        return CacheError(f"{place}: the source changed; run the same command again")


def open_source(place: str | Path) -> SourceCache:
    """Return the cache at a path or URL.

    Raises: CacheError where there is no cache, or an unfinished one behind a URL.
    """
    objects = open_objects(place)
    description = once_intact(lambda: read_description(objects))
    num_blocks = description.spec.num_blocks
    clips = once_intact(lambda: read_clips(objects, description))
    written, manifest, blocks = None, None, tuple(range(num_blocks))
    try:
        written, manifest = once_intact(lambda: read_complete(objects, description.spec))
    except BlockNotDone:
        if not isinstance(objects, DirectoryObjects):
            raise
        blocks = tuple(sorted(block for block in marked_blocks(objects.root) if block < num_blocks))
    return SourceCache(
        objects=objects,
        description=description,
        clips=clips,
        written_manifest=written,
        manifest=manifest,
        blocks=blocks,
    )


def read_source_mark(source: SourceCache, block: int) -> tuple[bytes, Mark]:
    """Return a block's mark, as written and as read. Raises: CacheError where it is not what the manifest names."""
    objects, name = source.objects, mark_path(Path(), block).as_posix()

    def read() -> tuple[bytes, Mark]:
        written = objects.get(name, most_nbytes=mark_limit(source.spec))
        if source.manifest is not None and source.manifest.files.get(name) != content_digest(written):
            raise CacheDamaged("is not the mark that the manifest names")
        return written, parse_mark(written, f"{objects.url}/{name}", block, source.spec)

    try:
        return once_intact(read)
    except FileNotFoundError as error:
        raise CacheError(f"{error}: the source changed; run the same command again") from error
    except CacheDamaged as error:
        if source.manifest is None:
            raise
        raise source.not_as_promised(name, str(error)) from error
