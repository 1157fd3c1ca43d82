"""The cache that is copied: its files, what describes them, its blocks one after another, and what a copy did."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import content_digest
from evl_cache.store.format.description import CacheDescription, read_clips, read_description
from evl_cache.store.format.layout import mark_path, marked_blocks
from evl_cache.store.format.limits import mark_limit
from evl_cache.store.format.manifest import BlockNotDone, Manifest, read_complete
from evl_cache.store.format.marks import Mark, parse_mark
from evl_cache.store.objects.objects import DirectoryObjects, Objects, open_objects

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
        self, copy_block: Callable[[int], int | None], *, place: str, threads: int, on_block: OnBlock
    ) -> TransferResult:
        """Copy every block, several at a time. The first error ends the work: what has not begun is not begun.

        Args:
            copy_block: copies a block; returns the bytes copied, or None where the same block is there.
            place: where the copy is.
            threads: blocks copied at a time.
            on_block: called after each block, with whether it was copied.
        """

        def copy(block: int) -> int | None:
            nbytes = copy_block(block)
            on_block(nbytes is not None)
            return nbytes

        with ThreadPoolExecutor(threads) as pool:
            try:
                moved = [nbytes for nbytes in pool.map(copy, self.blocks) if nbytes is not None]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return TransferResult(
            place=place,
            blocks=len(self.blocks),
            blocks_moved=len(moved),
            nbytes_moved=sum(moved),
            cache_digest=self.cache_digest,
        )


def open_source(place: str | Path) -> SourceCache:
    """Return the cache at a path or URL.

    Raises: CacheError where there is no cache, or an unfinished one behind a URL.
    """
    objects = open_objects(place)
    description = read_description(objects)
    num_blocks = description.spec.num_blocks
    clips = read_clips(objects, description)
    written, manifest, blocks = None, None, tuple(range(num_blocks))
    try:
        written, manifest = read_complete(objects, description.spec)
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
    try:
        written = objects.get(name, most_nbytes=mark_limit(source.spec))
    except FileNotFoundError as error:
        raise CacheError(f"{error}: the source changed; run the same command again") from error
    if source.manifest is not None and source.manifest.files.get(name) != content_digest(written):
        raise CacheError(
            f"{objects.url}/{name}: is not the mark that the manifest names: the source changed, or is damaged; "
            "run the same command again, or verify it there"
        )
    return written, parse_mark(written, f"{objects.url}/{name}", block, source.spec)
