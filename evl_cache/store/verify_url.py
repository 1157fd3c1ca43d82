"""Proof of a cache on a server: what is small is brought here and proved as on a disk, shards are read as they come."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged, CacheError, for_readers
from evl_cache.store.format.description import read_description
from evl_cache.store.format.grown import Grown, find_grown
from evl_cache.store.format.parts import place_of
from evl_cache.store.objects.address import is_url
from evl_cache.store.objects.objects import open_objects
from evl_cache.store.proving.files import OnProgress
from evl_cache.store.reading.remote_shards import RemoteShards
from evl_cache.store.reading.small_files import SmallFiles
from evl_cache.store.verify import Verification
from evl_cache.store.verify import verify_cache as verify_alone
from evl_cache.store.verify_grown import verify_cache as verify_grown


def verify_cache(place: str | Path, **options: Any) -> Verification:
    """Check every file of a cache at a path or URL, and of what was added to it.

    Behind a URL strays are not looked for: HTTP has no listing to rely on. Damage on the way is no damage of the cache:
    what is not as promised is asked for again.

    Arguments as `verify_alone`. Raises: as it does; Unreachable where a server fails, which tells nothing of the cache;
        CacheError where the cache changed meanwhile.
    """
    return _verify_url(str(place), **options) if is_url(place) else verify_grown(Path(place), **options)


def _verify_url(
    url: str,
    *,
    threads: int = 2,
    on_progress: OnProgress = lambda what, done, total: None,
    **options: Any,
) -> Verification:
    objects = open_objects(url)
    shown = objects.url
    with tempfile.TemporaryDirectory(prefix="evl-cache-verify-") as folder, _named_as(folder, shown):
        here = Path(folder)
        brought = {here: SmallFiles(objects, here)}
        brought[here].bring(threads, on_progress)
        grown = _grown_at(here)
        for addition in () if grown is None else grown.additions:
            path = here / addition.place
            brought[path] = SmallFiles(open_objects(place_of(url, addition)), path)
            brought[path].bring(threads, on_progress)

        def on_bytes(what: str, done: int, total: int) -> None:
            if what == "bytes":  # marks were counted as they came
                on_progress(what, done, total)

        def prove(path: Path, **how: Any) -> Verification:
            return verify_alone(path, remote=RemoteShards(brought[path].objects, path), **how)

        found = verify_grown(here, alone=prove, threads=threads, on_progress=on_bytes, **options)
        if found.problems:
            _check_unchanged(brought, shown)
        problems = tuple(
            replace(problem, reason=for_readers(problem.reason.replace(folder, shown)))
            for problem in found.problems
        )
        return replace(found, problems=problems)


def _grown_at(path: Path) -> Grown | None:
    try:
        return find_grown(path, read_description(path).spec)
    except CacheError:  # the proof tells
        return None


def _check_unchanged(brought: dict[Path, SmallFiles], shown: str) -> None:
    """Check that what is damaged is not another cache by now. Raises: CacheError."""
    for path, files in brought.items():
        try:
            spec = read_description(path).spec
        except CacheError:
            continue
        if not files.is_unchanged(spec):
            raise CacheError(f"{shown}: changed while it was verified; run the same command again")


@contextmanager
def _named_as(folder: str, shown: str) -> Iterator[None]:
    """Name the place of a cache, and not that of what was brought from it, in errors."""
    try:
        yield
    except CacheError as error:
        if folder not in str(error):
            raise
        text = str(error).replace(folder, shown)
        raise type(error)(for_readers(text) if isinstance(error, CacheDamaged) else text) from error
