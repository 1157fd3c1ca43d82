"""The end of a job: it removes the staged files and locks that killed jobs left, and writes manifest and index."""

from pathlib import Path

from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import file_identity
from evl_cache.store.disk.lock_files import CACHE_LOCK
from evl_cache.store.disk.locks import EXPIRY_S, LockWatcher
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.index import believed_index
from evl_cache.store.format.layout import DONE_NAME, LOCKS_NAME, MANIFEST_NAME, array_layouts
from evl_cache.store.format.manifest import manifest_digest, read_manifest
from evl_cache.store.writing.completion import write_index, write_manifest
from evl_cache.store.writing.leftovers import BlockLeftovers, remove_staged, staged_in
from evl_cache.store.writing.segments import remove_segments

_ATTEMPTS = 5  # at the manifest, by a job that is paused again and again


def finish_cache(
    cache_path: Path,
    spec: CacheSpec,
    *,
    keeps_manifest: bool = False,
    lock_expiry_s: float = EXPIRY_S,
    runtime: Runtime = REAL,
) -> str:
    """Remove what killed jobs left, unless another job is at work; write manifest and index of a complete cache.

    Args:
        keeps_manifest: a manifest that lies there with its index is taken for right, as whoever changes a mark removes
            it first. Otherwise all marks are compared with it.

    Returns: the cache digest.
    Raises: BlockNotDone; CacheError where the disk refuses; CacheDamaged where a mark is not intact.
    """
    directories = (cache_path, cache_path / DONE_NAME, *(cache_path / name for name in array_layouts(spec)))
    watcher = LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s, runtime=runtime)
    manifest = cache_path / MANIFEST_NAME
    before = file_identity(manifest)
    for attempts_left in reversed(range(_ATTEMPTS)):
        with watcher.wait_for(CACHE_LOCK) as lock:
            if file_identity(manifest) not in (None, before):  # one of many jobs does this for all
                return manifest_digest(cache_path, spec) or read_manifest(cache_path, spec).digest
            try:
                # Listed before the locks are looked at: what a job stages that begins meanwhile is not among these.
                staged = [path for directory in directories for path in staged_in(directory)]
                if watcher.sweep(own=lock, clean=BlockLeftovers(cache_path, spec).remove):
                    remove_staged(staged)
                index = believed_index(cache_path, spec) if keeps_manifest else None
                cache_digest = index.cache_digest if index is not None else None
                cache_digest = cache_digest or write_manifest(cache_path, spec, before_writing=lock.check)
            except CacheError as error:
                if not attempts_left or not lock.may_explain(error):
                    raise
                continue
            if lock.is_held():
                remove_segments(cache_path)
                return cache_digest
            # Written after a long pause: it may be older than a mark, though its index agrees with it.
            before, keeps_manifest = file_identity(manifest), False
    raise CacheError(
        f"{cache_path}: other jobs took the manifest's lock over {_ATTEMPTS} times; run the same command again"
    )


def index_cache(cache_path: Path, spec: CacheSpec, *, lock_expiry_s: float = EXPIRY_S) -> str:
    """Write the index of a cache that is complete, in place of one that may be there. Nothing else is changed.

    Returns: the cache digest.
    Raises: BlockNotDone for a cache that is not complete; CacheDamaged where its marks are not those that its manifest
        names; CacheError where the disk refuses.
    """
    with LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s).wait_for(CACHE_LOCK) as lock:
        return write_index(cache_path, spec, before_writing=lock.check)
