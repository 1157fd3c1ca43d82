"""Caches carried from place to place: what `push` and `pull` do."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from evl_cache.caches.places import cache_root
from evl_cache.errors import UsageError
from evl_cache.store import (
    OnBlock,
    TransferResult,
    as_url,
    cache_parts,
    copy_part,
    copy_to_bucket,
    copy_to_directory,
    directory_of,
    is_url,
    part_spec,
    public_url,
)

DEFAULT_THREADS = 4


def push(
    cache: Path,
    target: str,
    *,
    layers: Sequence[int] | None = None,
    codec: str | None = None,
    threads: int = DEFAULT_THREADS,
    on_block: OnBlock = lambda moved: None,
) -> TransferResult:
    """Copy a cache, or a part of it, to a directory, or whole to a bucket.

    Args:
        target: one that ends with a slash is what the cache is put into.
        layers, codec: what a part is; a copy where neither is given.

    Raises: as `copy_to_directory`; UsageError for a cache behind a URL, and for a part to a bucket.
    """
    cache = directory_of(cache)
    if layers is not None or codec is not None:
        if is_url(target):
            raise UsageError(
                f"{public_url(target)}: a part is made in a directory; pull it from {cache} into one, then push that"
            )
        return pull(str(cache), target, layers=layers, codec=codec, threads=threads, on_block=on_block)
    if target.endswith("/"):
        target += _name(str(cache), None, None)
    if is_url(target):
        return copy_to_bucket(cache, target, threads=threads, on_block=on_block)
    _check_apart(str(cache), Path(target))
    return copy_to_directory(cache, Path(target), threads=threads, on_block=on_block)


def pull(
    source: str,
    target: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    codec: str | None = None,
    threads: int = DEFAULT_THREADS,
    on_block: OnBlock = lambda moved: None,
) -> TransferResult:
    """Copy a cache, or a part of it, to a directory.

    Args:
        target: the new cache's directory, or with a slash at its end what it is put into; the first directory of
            `$EVL_CACHE_ROOT` by default.
        layers, codec: what a part is; a copy where neither is given.

    Raises: as `push`.
    """
    if target is None or target.endswith("/"):
        into = cache_root() if target is None else Path(target)
        place = into / _name(source, layers, codec)
    else:
        place = Path(target)
    _check_apart(source, place)
    if layers is None and codec is None:
        return copy_to_directory(source, place, threads=threads, on_block=on_block)
    return copy_part(source, place, layers=layers, codec=codec, threads=threads, on_block=on_block)


def _name(source: str, layers: Sequence[int] | None, codec: str | None) -> str:
    if layers is not None:
        return part_spec(cache_parts(source).spec, layers=layers, codec=codec).name
    if is_url(source):
        last = public_url(source).rpartition("/")[2]
        name = last if as_url(source).lower().startswith("s3:") else unquote(last)
        return last if "/" in name or "\0" in name or name in (".", "..") else name
    return os.path.basename(
        os.path.realpath(source)
    )  # which takes a circle of links, as `Path.resolve` does not


def _check_apart(source: str, target: Path) -> None:
    """Check that neither lies in the other, wherever links lead: a cache in a cache would be taken for its files."""
    if is_url(target):
        raise UsageError(f"{public_url(str(target))}: pull writes to a directory; push copies to s3://")
    if is_url(source):
        return
    come_from, go_to = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if _is_same(come_from, go_to):
        raise UsageError(f"{source}: from and to are the same directory; name another one")
    if any(_is_same(come_from, above) for above in go_to.parents):
        raise UsageError(f"{target}: lies in the cache that is copied, {source}; name a directory outside it")
    if any(_is_same(go_to, above) for above in come_from.parents):
        raise UsageError(
            f"{target}: holds the cache that is copied, {source}, and would become a cache itself; name a new directory"
        )


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one directory, by whatever names: a disk may be mounted twice, or heed no capitals."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one is not there
        return False
