"""The end of a job: it removes the staged files and locks that killed jobs left, and writes manifest and index."""

import contextlib
import os
from functools import partial
from pathlib import Path

from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import file_identity, remove_leftover
from evl_cache.store.disk.lock_files import CACHE_LOCK
from evl_cache.store.disk.locks import EXPIRY_S, BlockLock, LockWatcher
from evl_cache.store.disk.publish import is_staging_name
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.layout import DONE_NAME, LOCKS_NAME, MANIFEST_NAME, array_layouts
from evl_cache.store.format.manifest import manifest_digest, read_manifest
from evl_cache.store.writing.completion import write_manifest
from evl_cache.store.writing.index_files import remove_segments

_ATTEMPTS = 5  # at the manifest, by a job that is paused again and again


def remove_leftovers(directory: Path) -> None:
    """Remove staged files, as far as the disk lets. The caller knows that no live writer is in this directory."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if is_staging_name(name):
                remove_leftover(directory / name)


def finish_cache(
    cache_path: Path, spec: CacheSpec, *, lock_expiry_s: float = EXPIRY_S, runtime: Runtime = REAL
) -> str:
    """Remove what killed jobs left, unless another job is at work; write the manifest of a complete cache.

    Returns: the cache digest.
    Raises: BlockNotDone; CacheError where the disk refuses; CacheDamaged where a mark is not intact.
    """
    layouts = array_layouts(spec).values()

    def clean(block: int) -> None:
        for layout in layouts:
            remove_leftovers(layout.shard(cache_path, block).parent)

    watcher = LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s, runtime=runtime)
    manifest = cache_path / MANIFEST_NAME
    before = file_identity(manifest)
    for attempts_left in reversed(range(_ATTEMPTS)):
        with watcher.wait_for(CACHE_LOCK) as lock:
            if file_identity(manifest) not in (None, before):  # one of many jobs does this for all
                return manifest_digest(cache_path, spec) or read_manifest(cache_path, spec).digest
            try:
                if watcher.sweep(own=lock, clean=clean):
                    for directory in (
                        cache_path,
                        cache_path / DONE_NAME,
                        *(cache_path / layout.name for layout in layouts),
                    ):
                        remove_leftovers(directory)
                cache_digest = write_manifest(cache_path, spec, before_writing=partial(_check, lock))
            except CacheError as error:
                # Another job took this over meanwhile, or believes so, and what is staged here for a leftover.
                if not attempts_left or (
                    lock.is_held() and not isinstance(error.__cause__, FileNotFoundError)
                ):
                    raise
                continue
            if lock.is_held():
                remove_segments(cache_path)
                return cache_digest
            before = file_identity(manifest)  # written after a long pause: it may be older than a mark
    raise CacheError(
        f"{cache_path}: other jobs took the manifest's lock over {_ATTEMPTS} times; run the same command again"
    )


def _check(lock: BlockLock) -> None:
    if not lock.is_held():
        raise CacheError(f"{lock.path} was taken over by another job; run the same command again")
