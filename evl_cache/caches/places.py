"""Where caches lie: the places that `$EVL_CACHE_ROOT` names, and the caches at each."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store import SCHEMES, CachePart, cache_parts, is_url, open_objects, public_url

CACHE_ROOT_VARIABLE = "EVL_CACHE_ROOT"


@dataclass(frozen=True, kw_only=True)
class FoundCache:
    """A cache, by its description.

    Attributes:
        address: path or URL, which may hold credentials: show `place` or `name`.
        spec: what it holds, with what was added to it.
        origin: what it was made with.
        parts: it and what was added to it; none where they were not looked for.
    """

    address: str
    spec: CacheSpec
    origin: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[CachePart, ...] = field(default=(), repr=False, compare=False)

    @property
    def place(self) -> str:
        """Where it lies, as it may be shown."""
        return public_url(self.address) if is_url(self.address) else self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rstrip("/").rpartition("/")[2]


def cache_places() -> tuple[str, ...]:
    """The directories and URLs that `$EVL_CACHE_ROOT` names, parted as in PATH; `./caches` by default."""
    return split_places(os.environ.get(CACHE_ROOT_VARIABLE) or "caches")


def split_places(text: str) -> tuple[str, ...]:
    """Split a list of places at its colons, but not at those inside URLs (scheme, password, port)."""
    places: list[str] = []
    for piece in text.split(os.pathsep):
        before = places[-1] if places else ""
        if (piece.startswith("//") and before in SCHEMES) or _is_rest_of_host(before, piece):
            places[-1] = f"{before}{os.pathsep}{piece}"
        elif piece:
            places.append(piece)
    return tuple(places)


def _is_rest_of_host(before: str, piece: str) -> bool:
    """Whether `piece` is a password with its host, or a port: the URL before it has no path yet."""
    scheme, _, rest = before.partition("://")
    if scheme not in SCHEMES or not rest or "/" in rest:
        return False
    host = piece.partition("/")[0]
    return host.isdecimal() or ("@" in host and "@" not in rest)


def cache_root() -> Path:
    """The directory that new caches go to: the first of the places. Raises: UsageError where all are URLs."""
    for place in cache_places():
        if not is_url(place):
            return Path(place)
    raise UsageError(
        f"{CACHE_ROOT_VARIABLE} names URLs only; extract writes to a directory: name one too, or use --cache"
    )


def find_caches(place: str | Path) -> Iterator[FoundCache]:
    """Yield the caches directly under a place, by name, or the place itself; what is damaged is passed over.

    Raises: CacheError where a URL cannot be read.
    """
    with contextlib.suppress(NoCacheHere, CacheDamaged):
        yield _look_at(str(place))
        return
    for name in open_objects(place).folders():
        with contextlib.suppress(NoCacheHere, CacheError):
            yield _look_at(f"{str(place).rstrip('/')}/{name}")


def _look_at(place: str) -> FoundCache:
    found = cache_parts(place)
    origin = found.parts[-1].description.origin  # of the command that named all there is
    return FoundCache(address=place, spec=found.spec, origin=origin, parts=found.parts)
