"""A cache copied with what was added to it: each as any cache, and `grown.json`, which has readers see them, last."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from evl_cache.errors import NoCacheHere, UsageError
from evl_cache.store.copying import to_bucket, to_directory
from evl_cache.store.copying.source import THREADS, OnBlock, TransferResult
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.disk.publish import write_atomic
from evl_cache.store.format.description import read_description
from evl_cache.store.format.grown import (
    ADDITIONS_NAME,
    GROWN_NAME,
    SECOND_COPY_NAME,
    Grown,
    find_grown,
    grown_content,
    grown_digest,
)
from evl_cache.store.format.parts import place_of
from evl_cache.store.objects.objects import Objects, open_objects, open_writable
from evl_cache.store.reading.attempts import once_intact


def copy_to_directory(
    place: str | Path, target: Path, *, threads: int = THREADS, on_block: OnBlock = lambda moved: None
) -> TransferResult:
    """Copy a cache from a directory or URL into a directory: only blocks that differ. Run it again after a kill.

    Args:
        threads: blocks copied at a time.
        on_block: called after each block, with whether it was copied.

    Raises: UsageError where another cache is at `target`, or one that has grown otherwise; CacheDamaged where what comes
        is not what the marks promise; CacheError where source or disk refuse, or the source changed meanwhile.
    """
    grown = _grown_at(open_objects(place))
    _check_target(grown, _grown_at(open_objects(target)), str(target))

    def copy(source: str | Path, copied: str | Path) -> TransferResult:
        check_no_links(target, Path(copied))
        return to_directory.copy_to_directory(source, Path(copied), threads=threads, on_block=on_block)

    def write(content: bytes) -> None:
        make_directories(target / ADDITIONS_NAME)
        for name in (SECOND_COPY_NAME, GROWN_NAME):
            write_atomic(target / name, content)

    return _copy_all(grown, place, target, copy=copy, write=write)


def copy_to_bucket(
    cache_path: Path, url: str, *, threads: int = THREADS, on_block: OnBlock = lambda moved: None
) -> TransferResult:
    """Send a cache to `s3://bucket/prefix`: only blocks that differ. Run it again after a kill.

    Arguments and errors as `copy_to_directory`. Readers need the manifest, so an unfinished cache is not read from
    there until it was sent complete.
    """
    grown, objects = _grown_at(open_objects(cache_path)), open_writable(url)
    _check_target(grown, _grown_at(objects), objects.url)

    def copy(source: str | Path, copied: str | Path) -> TransferResult:
        return to_bucket.copy_to_bucket(Path(source), str(copied), threads=threads, on_block=on_block)

    def write(content: bytes) -> None:
        for name in (SECOND_COPY_NAME, GROWN_NAME):
            objects.put(name, content)

    return _copy_all(grown, cache_path, url, copy=copy, write=write)


def _copy_all(
    grown: Grown | None,
    place: str | Path,
    target: str | Path,
    *,
    copy: Callable[[str | Path, str | Path], TransferResult],
    write: Callable[[bytes], None],
) -> TransferResult:
    """Copy a cache and what was added to it. `write`: writes `grown.json` at the target."""
    base = copy(place, target)
    if grown is None:
        return base
    done = [base]
    done += [copy(place_of(place, addition), place_of(target, addition)) for addition in grown.additions]
    digests = [one.cache_digest for one in done]
    is_complete = None not in digests
    if is_complete:
        write(grown_content(_named(grown, [one for one in digests if one])))
    return replace(
        base,
        blocks=sum(one.blocks for one in done),
        blocks_moved=sum(one.blocks_moved for one in done),
        nbytes_moved=sum(one.nbytes_moved for one in done),
        cache_digest=grown_digest([one for one in digests if one]) if is_complete else None,
    )


def _named(grown: Grown, digests: Sequence[str]) -> Grown:
    """Return what was added as it was copied: a member may have been repaired since `grown.json` was written."""
    additions = zip(grown.additions, digests[1:], strict=True)
    return replace(
        grown,
        cache_digest=digests[0],
        additions=tuple(replace(addition, cache_digest=own) for addition, own in additions),
    )


def _grown_at(objects: Objects) -> Grown | None:
    with contextlib.suppress(NoCacheHere):
        return once_intact(lambda: find_grown(objects, read_description(objects).spec))
    return None


def _check_target(grown: Grown | None, there: Grown | None, where: str) -> None:
    """Check that what was added at a target is what was added here first. Raises: UsageError."""
    mine, theirs = ([one.name for one in side.additions] if side else [] for side in (grown, there))
    if mine[: len(theirs)] != theirs:
        raise UsageError(
            f"{where} holds a cache that grew otherwise ({', '.join(theirs)}; here {', '.join(mine) or 'nothing was added'}); "
            "name another place"
        )
