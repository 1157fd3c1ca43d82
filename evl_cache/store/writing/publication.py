"""Giving a block its files and its mark, durably and in an order in which nothing that is there is lost.

A block without a mark gets its files first, none in place of another, then its mark. A block that has a mark is redone
under it: new files take the place of the old ones, then the new mark that of the old one. What a redo keeps is in both
the old files and the new, and readers go by each chunk's checksum: at every instant they have what the old mark
promises. `redo_path` tells whoever comes after a redo that was killed halfway. See docs/cache-format.md.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evl_cache.errors import CacheDamaged, CacheError, reason_alone
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.checksum import content_digest, file_digest
from evl_cache.store.disk.directories import fsync_directory, make_directories, make_empty_file
from evl_cache.store.disk.file_system import (
    check_no_links,
    disk_error,
    file_identity,
    is_empty,
    is_refusal,
    is_there,
    remove_file,
)
from evl_cache.store.disk.locks import BlockLock
from evl_cache.store.disk.publish import AlreadyPublished, StagedFile, write_atomic
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import (
    MANIFEST_NAME,
    array_layouts,
    is_in_redo,
    mark_path,
    marked_blocks,
    redo_path,
    stored_blocks,
)
from evl_cache.store.format.marks import ClipRecord, Mark, ShardFiles, mark_content, read_mark
from evl_cache.store.shards.shard_index import MISSING, read_index
from evl_cache.store.writing.staged_block import StagedBlock

_MOST_NAMED = 3  # clips in an error


class BlockLost(CacheError):
    """Another job took the block over while this one was paused: that job's work counts, this one's is dropped."""


class RowsAtStake(CacheError):
    """What was to replace a block lacks features that the block has. Nothing was changed."""


def check_nothing_lost(clips: Sequence[ClipRecord], there: Sequence[bool], *, place: str, block: int) -> None:
    """Check that a block may be replaced: no clip that has features there comes without.

    Args:
        clips: records of what is to come, in order.
        there: whether each clip has features now.
        place: of the cache, for the error.

    Raises: RowsAtStake.
    """
    lost = [clip for clip, has_features in zip(clips, there, strict=True) if has_features and clip.error]
    if lost:
        named = lost[:_MOST_NAMED]
        told = "; ".join(f"{clip.id}: {reason_alone(clip.error or '', clip.id)}" for clip in named)
        raise RowsAtStake(
            f"{place}: block {block} stays as it is: {len(lost)} of its clips would lose their features "
            f"({told}{'; …' if len(lost) > _MOST_NAMED else ''}); bring back what they need where they are made, then run "
            "the same command again"
        )


def clips_there(cache_path: Path, spec: CacheSpec, block: int) -> tuple[bool, ...]:
    """Return which clips of a block have features, as its mark says.

    A block whose mark was lost or damaged may still have them: then the indices of its files tell. Without a sign
    that it ever had a mark, it has none.
    """
    if (mark := valid_mark(cache_path, spec, block)) is not None:
        return tuple(clip.error is None for clip in mark.clips)
    there = [False] * len(spec.clips_of_block(block))
    if not _was_marked(cache_path, block):
        return tuple(there)
    num_chunks = spec.block_samples * len(spec.stored_layers)
    found = []
    for layout in array_layouts(spec).values():
        with contextlib.suppress(CacheError):  # what cannot be read tells nothing
            index = read_index(layout.shard(cache_path, block), num_chunks)
            present = index[:, 0] != MISSING
            found.append(present.reshape(spec.block_clips, -1).all(axis=1)[: len(there)].tolist())
    return tuple(all(column) for column in zip(*found, strict=True)) if found else tuple(there)


class BlockPublication:
    """Publishes one block, under its lock.

    Before every mark it syncs all directories on the way to the block's files. Nobody else has to, and those that a job
    left that died are synced as well.

    Args:
        lock: held by this process; others may take it over where this one is paused for long.
        runtime: gives the threads that sync.
    """

    def __init__(
        self, cache_path: Path, spec: CacheSpec, block: int, *, lock: BlockLock, runtime: Runtime = REAL
    ) -> None:
        self._cache_path, self._spec, self._block, self._lock = cache_path, spec, block, lock
        self._runtime = runtime
        self._layouts = array_layouts(spec)
        self._mark_path = mark_path(cache_path, block)
        make_directories(self._mark_path.parent)  # what copies a cache may leave empty directories out
        shards = [layout.shard(cache_path, block) for layout in self._layouts.values()]
        ways = (parent for shard in shards for parent in shard.parents if parent.is_relative_to(cache_path))
        self._directories = tuple(dict.fromkeys(ways))
        self._mark_before = file_identity(self._mark_path)
        self.is_redo = _was_marked(cache_path, block)

    def publish(self, mark: Mark, staged: Mapping[str, StagedFile], *, written: bytes | None = None) -> Mark:
        """Give the block these files and this mark.

        The files are synced at once, then named, then the directories are synced at once; then comes the mark.

        Args:
            staged: by array; left out where the right file is there already.
            written: the mark's bytes, where another cache has them.

        Returns: the mark that stands: this one, or an equal block's that another job finished meanwhile.
        Raises: RowsAtStake; BlockLost where another job holds the block now; CacheError where the disk refuses.
        """
        self.check_lock()
        content = written or mark_content(mark, self._spec)
        try:
            if self._is_done_meanwhile():
                raise self._lost()
            with StagedBlock(staged, self._directories, self._runtime) as block:
                publish = self._replace_block if self.is_redo else self._publish_block
                return publish(mark, content, block)
        except CacheError as error:
            # What fails after a takeover fails because of it. And a job that was paused, and still believes that it
            # has the lock, takes for a leftover what the job that has it now has staged, and removes it.
            is_held = self._lock.is_held()
            if is_held and not isinstance(error.__cause__, FileNotFoundError):
                raise
            if not is_held:
                self._withdraw_if_broken()
            raise self._lost() from error

    def check_lock(self) -> None:
        """Check that the block is still this job's. Raises: BlockLost."""
        if not self._lock.is_held():
            raise self._lost()

    def publish_file(self, name: str, file: StagedFile) -> None:
        """Give one array's file its name, in a block that has no mark; durable with the mark. Errors as `publish`."""
        path = self._layouts[name].shard(self._cache_path, self._block)
        check_no_links(self._cache_path, path.parent)
        # What is there was left by a job that died before its mark, or is of one that took the block over. The right
        # file stays, so that open readers see no change.
        if is_there(path) and not has_digest(path, (file.size, file.sha256)):
            self.check_lock()
            remove_file(path)
        with contextlib.suppress(AlreadyPublished):
            file.publish(path, sync_directory=False)

    def publish_mark(self, mark: Mark, content: bytes) -> Mark:
        """Give a block that had no mark, and whose files lie there, its mark. Errors as `publish`."""
        with StagedBlock({}, self._directories, self._runtime) as block:
            block.sync_names()
        return self._write_mark(mark, content)

    def check_nothing_lost(self, mark: Mark) -> None:
        """Check that the block may be replaced by what a mark describes. Raises: RowsAtStake."""
        if self.is_redo:
            there = clips_there(self._cache_path, self._spec, self._block)
            check_nothing_lost(mark.clips, there, place=str(self._cache_path), block=self._block)

    def _write_mark(self, mark: Mark, content: bytes) -> Mark:
        self.check_lock()
        try:
            write_atomic(self._mark_path, content, replace=False)
        except AlreadyPublished:
            found = valid_mark(self._cache_path, self._spec, self._block)
            if found is not None and found.files == dict(mark.files):
                return found
            if not self._lies_there(mark.files):
                raise self._lost() from None
            write_atomic(self._mark_path, content)
        return self._written_mark()

    def _publish_block(self, mark: Mark, content: bytes, staged: StagedBlock) -> Mark:
        staged.seal()
        for name, file in staged.files.items():
            self.publish_file(name, file)
        staged.sync_names()
        if not self._written_lies_there(staged):
            raise self._lost()
        found = self._write_mark(mark, content)
        # Whoever took the block over before this look may have changed its files after the look above; whoever
        # takes it over from now on finds the mark.
        if not self._lock.is_held() and not self._lies_there(found.files):
            raise self._lost()
        return found

    def _replace_block(self, mark: Mark, content: bytes, staged: StagedBlock) -> Mark:
        """Put files, then the mark, in place of those that are there; what is equal stays."""
        self.check_nothing_lost(mark)
        staged.seal()
        is_other = not has_digest(self._mark_path, content_digest(content))
        if is_other:
            self._begin_redo()
        for name, file in staged.files.items():
            path = self._layouts[name].shard(self._cache_path, self._block)
            check_no_links(self._cache_path, path.parent)
            if not has_digest(path, mark.files[name].digest):
                self.check_lock()
                file.publish_replacing(path, sync_directory=False)
        staged.sync_names()
        if not self._lies_there(mark.files):
            raise self._lost()
        self.check_lock()
        if is_other:
            write_atomic(self._mark_path, content)
        found = self._written_mark()
        if not self._lock.is_held() and not self._lies_there(found.files):
            raise self._lost()
        self._end_redo()
        return found

    def _begin_redo(self) -> None:
        self._note_redo()
        self.check_lock()
        self._remove_manifest()  # it names the old mark

    def _note_redo(self) -> None:
        make_empty_file(redo_path(self._cache_path, self._block))

    def _remove_manifest(self) -> None:
        manifest = self._cache_path / MANIFEST_NAME
        if not is_there(manifest):
            return
        # Of blocks that lost their marks the manifest alone tells that they were done, and may have features.
        for block in stored_blocks(self._cache_path, self._spec) - marked_blocks(self._cache_path):
            make_empty_file(redo_path(self._cache_path, block))
        _unlink_for_good(self._cache_path, manifest)

    def _end_redo(self) -> None:
        self.check_lock()
        _unlink_for_good(self._cache_path, redo_path(self._cache_path, self._block))

    def _written_mark(self) -> Mark:
        written = valid_mark(self._cache_path, self._spec, self._block)
        if written is None:
            raise self._lost()
        return written

    def _is_done_meanwhile(self) -> bool:
        """Whether the job that had this block before finished it: it was paused, woke, and had little left to do."""
        if file_identity(self._mark_path) in (None, self._mark_before):
            return False
        found = valid_mark(self._cache_path, self._spec, self._block)
        return found is not None and self._lies_there(found.files)

    def _withdraw_if_broken(self) -> None:
        """Take back a mark whose files are not those it names: this job may have changed them without the lock.

        The mark may be another job's, which believes the block done. Where features were there before, the mark
        stays, and whoever comes next keeps of the block what passes the mark's checksums.
        """
        found = valid_mark(self._cache_path, self._spec, self._block)
        if found is None or self._lies_there(found.files):
            return
        if self.is_redo:
            self._note_redo()
        self._remove_manifest()
        if not self.is_redo:
            _unlink_for_good(self._cache_path, self._mark_path)

    def _written_lies_there(self, staged: StagedBlock) -> bool:
        """Whether the names lead to what was written."""
        try:
            return staged.lies_at(
                {name: self._layouts[name].shard(self._cache_path, self._block) for name in staged.files}
            )
        except CacheError as error:
            _raise_if_refused(self._mark_path, error)
            return False

    def _lies_there(self, records: ShardFiles) -> bool:
        """Whether the names lead to the files of a mark."""
        return all(
            has_digest(layout.shard(self._cache_path, self._block), records[name].digest)
            for name, layout in self._layouts.items()
        )

    def _lost(self) -> BlockLost:
        return BlockLost(
            f"{self._cache_path}: block {self._block} was taken over by another job; run the same command again"
        )


def valid_mark(cache_path: Path, spec: CacheSpec, block: int) -> Mark | None:
    """Return a block's mark where it is intact; None otherwise."""
    try:
        return read_mark(cache_path, block, spec)
    except CacheDamaged:
        return None


def valid_marks(cache_path: Path, spec: CacheSpec) -> Iterator[Mark]:
    """Yield the intact marks of a cache, by block."""
    for block in sorted(marked_blocks(cache_path)):
        if block < spec.num_blocks and (mark := valid_mark(cache_path, spec, block)) is not None:
            yield mark


def _was_marked(cache_path: Path, block: int) -> bool:
    """Whether a block has a mark, intact or not, or is part of a cache that is complete, or was when a redo began."""
    mark = mark_path(cache_path, block)
    try:
        has_mark = not is_empty(mark)  # an empty one is a placeholder, see `StagedFile.publish`
    except (OSError, CacheError) as error:
        _raise_if_refused(mark, error)
        has_mark = is_there(mark)
    return has_mark or is_in_redo(cache_path, block) or is_there(cache_path / MANIFEST_NAME)


def _unlink_for_good(cache_path: Path, path: Path) -> None:
    check_no_links(cache_path, path.parent)
    if is_there(path, follow_links=False):
        remove_file(path)
        fsync_directory(path.parent)


def has_digest(path: Path, digest: tuple[int, str]) -> bool:
    """Whether a file of this size and sha256 lies there. Raises: CacheError where the disk refuses to tell."""
    try:
        return path.stat().st_size == digest[0] and file_digest(path) == digest
    except (OSError, CacheError) as error:
        _raise_if_refused(path, error)
        return False


def _raise_if_refused(path: Path, error: OSError | CacheError) -> None:
    """Raise CacheError where the disk would not tell what lies there: that is no other job's doing."""
    if isinstance(error, OSError) and is_refusal(error):
        raise disk_error("read", path, error) from error
    if isinstance(error.__cause__, OSError) and is_refusal(error.__cause__):
        raise error
