"""Caches copied block by block: whole blocks only, their marks after them and the manifest last.

What comes is compared with the digests of the marks before it gets its name, so that half a cache, or a damaged
one, is never taken for whole; a copy that was killed is taken up at the file where it was. To a bucket: `upload`.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.copying.card_file import read_card, write_card
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.locks import LockWatcher
from evl_cache.store.disk.publish import (
    AlreadyPublished,
    StagedFile,
    fsync_directory,
    make_directories,
    stage_file,
)
from evl_cache.store.format.description import (
    CacheDescription,
    read_clips_from,
    read_description,
    read_description_from,
)
from evl_cache.store.format.layout import (
    LOCKS_NAME,
    MANIFEST_NAME,
    ArrayLayout,
    array_layouts,
    mark_path,
    marked_blocks,
)
from evl_cache.store.format.manifest import MOST_MANIFEST_NBYTES, Manifest, parse_manifest
from evl_cache.store.format.marks import MOST_MARK_NBYTES, FileRecord, Mark, parse_mark
from evl_cache.store.format.recomputed import read_projections_from
from evl_cache.store.objects.objects import DirectoryObjects, Objects, open_objects
from evl_cache.store.writing.block_writer import clear_mark
from evl_cache.store.writing.create import create_cache
from evl_cache.store.writing.finish import finish_cache, remove_leftovers

THREADS = 4
_PART_NBYTES = 16 << 20

OnBlock = Callable[[bool], None]


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What a push or pull did.

    Attributes:
        place: where the cache now is. blocks, blocks_moved: there now; that differed and were copied.
        nbytes_moved: of data files. cache_digest: None where the source is not complete.
    """

    place: str
    blocks: int
    blocks_moved: int
    nbytes_moved: int
    cache_digest: str | None


@dataclass(frozen=True, kw_only=True)
class SourceCache:
    """A cache that is copied: its files, and what describes them. `manifest`: None where it is not complete."""

    objects: Objects
    description: CacheDescription
    clips: tuple[Clip, ...]
    manifest: Manifest | None
    blocks: tuple[int, ...]

    @property
    def spec(self) -> CacheSpec:
        """Of the description."""
        return self.description.spec


def open_source(place: str | Path) -> SourceCache:
    """Raises: CacheError where there is no cache, or an unfinished one behind a URL."""
    objects = open_objects(place)
    description = read_description_from(objects)
    spec, manifest = description.spec, None
    clips = read_clips_from(objects, description)
    if len(clips) != spec.num_clips:
        raise CacheDamaged(
            f"{objects.url}: {len(clips)} clips listed, {spec.num_clips} described; repair the cache"
        )
    try:
        written = objects.get(MANIFEST_NAME, most_nbytes=MOST_MANIFEST_NBYTES)
        manifest = parse_manifest(written, spec, f"{objects.url}/{MANIFEST_NAME}")
        blocks: Iterable[int] = range(spec.num_blocks)
    except FileNotFoundError as error:
        if not isinstance(objects, DirectoryObjects):
            raise CacheError(
                f"{objects.url}: has no {MANIFEST_NAME}: it is not complete; finish extract or push, then run this again"
            ) from error
        blocks = sorted(block for block in marked_blocks(objects.root) if block < spec.num_blocks)
    return SourceCache(
        objects=objects, description=description, clips=clips, manifest=manifest, blocks=tuple(blocks)
    )


def lay_down_as(source: SourceCache, target: Path) -> None:
    """Make the source's description at a directory, or find it there. Raises: UsageError for another cache."""
    spec, description = source.spec, source.description
    projections = None
    if spec.recomputes_maps:
        projections = read_projections_from(source.objects, spec, description.projections_sha256)
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
        threads: blocks copied at a time. on_block: called with whether it was copied, after each block.

    Raises: UsageError where another cache is at `target`; CacheDamaged where what comes is not what the marks
        promise; CacheError where source or disk refuse, or the source changed meanwhile.
    """
    source = open_source(place)
    lay_down_as(source, target)
    locks = LockWatcher(target / LOCKS_NAME)

    def copy(block: int) -> int | None:
        with locks.wait_for(f"{block:06d}"):
            moved = _copy_block(source, target, block)
        on_block(moved is not None)
        return moved

    with ThreadPoolExecutor(threads) as pool, cancelled_on_error(pool):
        moved = [nbytes for nbytes in pool.map(copy, source.blocks) if nbytes is not None]
    if (card := read_card(source.objects)) is not None and card != read_card(DirectoryObjects(target)):
        write_card(target, card)
    return TransferResult(
        place=str(target),
        blocks=len(source.blocks),
        blocks_moved=len(moved),
        nbytes_moved=sum(moved),
        cache_digest=_finish(source, target),
    )


def _finish(source: SourceCache, target: Path) -> str | None:
    if source.manifest is None:
        return None
    cache_digest = finish_cache(target, source.spec)
    if cache_digest != source.manifest.digest:
        (target / MANIFEST_NAME).unlink(missing_ok=True)
        raise CacheDamaged(
            f"{source.objects.url}: its files do not make up the cache that its manifest names; verify it there"
        )
    return cache_digest


def read_source_mark(source: SourceCache, block: int) -> tuple[bytes, Mark]:
    """A block's mark, as written and as read. Raises: CacheError where it is not what the manifest names."""
    objects, name = source.objects, mark_path(Path(), block).as_posix()
    try:
        written = objects.get(name, most_nbytes=MOST_MARK_NBYTES)
    except FileNotFoundError as error:
        raise CacheError(f"{error}: the source changed; run the same command again") from error
    if source.manifest is not None:
        found = (len(written), hashlib.sha256(written).hexdigest())
        if source.manifest.files.get(name) != found:
            raise CacheError(
                f"{objects.url}/{name}: is not the mark that the manifest names: the source changed, or is damaged; "
                "run the same command again, or verify it there"
            )
    return written, parse_mark(written, f"{objects.url}/{name}", block, source.spec)


def _copy_block(source: SourceCache, target: Path, block: int) -> int | None:
    """Returns: bytes copied, or None where the same block is there."""
    written, mark = read_source_mark(source, block)
    path, layouts = mark_path(target, block), array_layouts(source.spec)
    if _has_content(path, written) and all(
        _has_size(layout.shard(target, block), mark.files[name].size) for name, layout in layouts.items()
    ):
        return None
    clear_mark(target, source.spec, block, unless=mark.files)
    nbytes = sum(
        _copy_shard(source.objects, layout, mark.files[name], target, block)
        for name, layout in layouts.items()
    )
    with stage_file(path.parent) as staged:
        staged.write(written)
        staged.publish_replacing(path)
    return nbytes


def _copy_shard(objects: Objects, layout: ArrayLayout, record: FileRecord, target: Path, block: int) -> int:
    """Returns: bytes copied; 0 where the file is there already, which `clear_mark` has compared."""
    path = layout.shard(target, block)
    check_no_links(target, path.parent)
    if path.exists():
        return 0
    make_directories(path.parent)
    remove_leftovers(path.parent)
    name = layout.shard(Path(), block).as_posix()
    with stage_file(path.parent) as staged:
        _receive(objects, name, record, staged)
        with contextlib.suppress(AlreadyPublished):
            staged.publish(path)
    fsync_directory(path.parent)
    return record.size


def _receive(objects: Objects, name: str, record: FileRecord, staged: StagedFile) -> None:
    while staged.size < record.size:
        try:
            part = objects.get_range(name, staged.size, min(_PART_NBYTES, record.size - staged.size))
        except FileNotFoundError as error:
            raise CacheError(f"{error}: the source changed; run the same command again") from error
        if not len(part):
            break
        staged.write(part)
    if (staged.size, staged.sha256) != (record.size, record.sha256):
        raise CacheDamaged(
            f"{objects.url}/{name}: what arrived is not what its mark promises: the source changed, or is damaged; "
            "run the same command again, or verify it there"
        )


def _has_content(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


@contextlib.contextmanager
def cancelled_on_error(pool: ThreadPoolExecutor) -> Iterator[None]:
    """The first error ends the work: what has not begun is not begun."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
