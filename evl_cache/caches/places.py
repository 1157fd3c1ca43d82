"""Where caches lie: the places that `$EVL_CACHE_ROOT` names, and what is seen at each."""

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from evl_cache.errors import (
    NO_SUCH_FILE,
    EvlCacheError,
    NoCacheHere,
    Unreachable,
    UsageError,
    WaitEnded,
)
from evl_cache.spec import CacheSpec
from evl_cache.store import CachePart, OtherZarr, as_url, cache_parts, is_url, open_objects, public_url

CACHE_ROOT_VARIABLE = "EVL_CACHE_ROOT"
_DEFAULT_PLACE = "caches"
_AT_ONCE = 16  # places, and caches of each: they wait for servers and disks
_LOOK_EVERY_S = 0.1
_SILENCE_S = 5.0  # a look that fails after so long has waited for a server
# A URL up to the colon that ends it: user and password, a host that may be in brackets, a port, a path without colons.
# What follows its bracket, or lacks one, stays with it, and is refused as one; so does a secret key's slash.
_PLACE = re.compile(
    r"[a-z][a-z0-9+.-]+://(?:[^/@:]*:(?!/)[^:@]*@|[^/]*@)?(?:\[[^]/]*)?[^/:]*(?::[0-9]+(?=[/:]|\Z))?(?:/[^:]*)?|[^:]+",
    re.IGNORECASE,
)
# Directories that the system keeps at the top of a disk, and whose owner alone may look into them.
_SYSTEMS_OWN = re.compile(r"lost\+found|\.Trash-.*|\.Trashes|\.Spotlight-.*")
Item = TypeVar("Item")
Seen = TypeVar("Seen")


@dataclass(frozen=True, kw_only=True)
class FoundCache:
    """A cache, by its description.

    Attributes:
        address: path or URL, which may hold credentials: show `place` or `name`.
        spec: what it holds, with what was added to it.
        origin: what it was made with.
        parts: it and what was added to it; none where they were not looked for.
    """

    address: str = field(repr=False)
    spec: CacheSpec
    origin: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[CachePart, ...] = field(default=(), repr=False, compare=False)

    @property
    def place(self) -> str:
        """Where it lies, as it may be shown."""
        return _shown(self.address)

    @property
    def name(self) -> str:
        """The last part of its place."""
        return self.place.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class NotSeen:
    """A place, or a cache at one, that could not be looked at: what is there is unknown.

    Attributes:
        place: path, or URL without credentials.
        reason: why, and what to do about it.
    """

    place: str
    reason: str

    @classmethod
    def of(cls, address: str, error: Exception) -> "NotSeen":
        """Return what an error tells of a path or URL, without the name of the place that it begins with."""
        place = _shown(address).rstrip("/") or address
        told = str(error)
        if isinstance(error, OSError):
            told = f"{error.strerror or error}; check the path, its permissions and the disk"
        return cls(place=place, reason=told.removeprefix(f"{place}/").removeprefix(f"{place}: "))

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def _shown(address: str) -> str:
    return public_url(address) if is_url(address) else address


def cache_places() -> tuple[str, ...]:
    """The directories and URLs that `$EVL_CACHE_ROOT` names, parted as in PATH; `./caches` by default."""
    named = split_places(os.environ.get(CACHE_ROOT_VARIABLE, ""))
    return tuple(map(os.path.expanduser, named)) or (_DEFAULT_PLACE,)


def split_places(text: str) -> tuple[str, ...]:
    """Split a list of places at its colons, but not at those inside URLs (scheme, password, IPv6 address, port)."""
    return tuple(_PLACE.findall(text))


def cache_root() -> Path:
    """The directory that new caches go to: the first of the places. Raises: UsageError where all are URLs."""
    for place in cache_places():
        if not is_url(place):
            return Path(place)
    raise UsageError(
        f"{CACHE_ROOT_VARIABLE} names URLs only; extract writes to a directory: name one too, or use --cache"
    )


def look_at_places(
    places: Sequence[str | Path] | None, look: Callable[[str | Path], Iterable[Seen]]
) -> Iterator[Seen]:
    """Look at all places at once, so that none waits for another, and yield what is seen, in their order.

    Args:
        places: None for those of `$EVL_CACHE_ROOT`, of which the default need not exist.
        look: returns what is seen at one, such as `find_caches`.
    """
    if places is None:
        places = cache_places()
        if not split_places(os.environ.get(CACHE_ROOT_VARIABLE, "")) and not os.path.lexists(_DEFAULT_PLACE):
            return
    once = {_one_name(str(place)): place for place in reversed(places)}  # of several names the first
    for seen in _together(lambda place: list(look(place)), list(reversed(once.values()))):
        yield from seen


def _one_name(place: str) -> str:
    """Return the same for a place that is named twice, with a slash at its end or through a link."""
    return as_url(place).rstrip("/") if is_url(place) else os.path.realpath(place)


def find_caches(place: str | Path) -> Iterator[FoundCache | NotSeen]:
    """Yield the caches directly under a place, by name, or the place itself, and what could not be looked at.

    Directories that hold no cache are passed over. Raises: WaitEnded.
    """
    address, trouble = str(place), None
    try:
        _check_there(address)
        found = _look_at(address)
    except (NoCacheHere, OtherZarr):
        pass
    except WaitEnded:
        raise
    except (Unreachable, UsageError) as error:
        yield NotSeen.of(address, error)
        return
    except (EvlCacheError, OSError) as error:  # a damaged cache, which others may lie below all the same
        trouble = NotSeen.of(address, error)
        yield trouble
    else:
        yield found
        return
    try:
        names = _names_at(address)
    except WaitEnded:
        raise
    except (EvlCacheError, OSError) as error:
        if trouble is None:
            yield NotSeen.of(address, error)
        return
    # A server's folder may be named such as `50% #2`; in a bucket such a name stands as it is.
    is_http = is_url(address) and as_url(address).lower().startswith("http")
    below = [f"{address.rstrip('/')}/{quote(name) if is_http else name}" for name in names]
    yield from (seen for seen in look_together(_seen, below, address_of=str) if seen is not None)


def look_together(
    look: Callable[[Item], Seen], items: Sequence[Item], *, address_of: Callable[[Item], str]
) -> Iterator[Seen | NotSeen]:
    """Yield what is seen at each of the caches of one place, in order; they are looked at together.

    Args:
        look: raises CacheError or OSError for a cache that cannot be looked at.
        address_of: returns the path or URL of one.

    Raises: WaitEnded.
    """
    silent: list[NotSeen] = []

    def look_at(item: Item) -> Seen | NotSeen:
        if silent:  # or each would wait as long once more
            return NotSeen(place=_shown(address_of(item)), reason=f"not asked for, as {silent[0]}")
        begun = time.monotonic()
        try:
            return look(item)
        except WaitEnded:
            raise
        except (EvlCacheError, OSError) as error:
            found = NotSeen.of(address_of(item), error)
            if isinstance(error, Unreachable) and time.monotonic() - begun > _SILENCE_S:
                silent.append(found)
            return found

    return _together(look_at, items)


def _together(look: Callable[[Item], Seen], items: Sequence[Item]) -> Iterator[Seen]:
    threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="look")
    try:
        for future in [threads.submit(look, item) for item in items]:
            while not wait((future,), timeout=_LOOK_EVERY_S).done:
                pass  # a signal that comes just before a wait is handled at its end only
            yield future.result()
    finally:
        # Who is interrupted does not wait for servers: a wait is ended by the signal, or when it has lasted long enough.
        threads.shutdown(wait=False, cancel_futures=True)


def _check_there(address: str) -> None:
    """Check that a directory is there. Raises: Unreachable: the disk that it is on may be missing."""
    if is_url(address):
        return
    try:
        is_directory = stat.S_ISDIR(os.stat(address).st_mode)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in NO_SUCH_FILE:
            raise Unreachable(
                f"{address}: cannot be looked at ({error.strerror}); check its permissions and the disk"
            ) from error
        is_directory = False
    if not is_directory:
        raise Unreachable(f"{address}: no such directory; correct the name, or mount the disk that it is on")


def _names_at(address: str) -> list[str]:
    """Return the names of the directories at a place. Raises: Unreachable where there is no list of them."""
    try:
        names = open_objects(address).folders()
    except FileNotFoundError as error:
        raise Unreachable(
            f"{_shown(address)}: has no list of what is there; check the address, or name a cache itself"
        ) from error
    return [name for name in names if is_url(address) or not _SYSTEMS_OWN.fullmatch(name)]


def _seen(address: str) -> FoundCache | None:
    try:
        return _look_at(address)
    except (NoCacheHere, OtherZarr):
        return None


def _look_at(place: str) -> FoundCache:
    found = cache_parts(place)
    origin = found.parts[-1].description.origin  # of the command that named all there is
    return FoundCache(address=place, spec=found.spec, origin=origin, parts=found.parts)
