"""A cache and what was added to it, by their descriptions: what all of them hold together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, NoCacheHere
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.format.description import CacheDescription, read_clips, read_description
from evl_cache.store.format.grown import (
    CLIPS,
    GROWN_NAME,
    Addition,
    Box,
    Grown,
    find_grown,
    grown_digest,
    grown_spec,
)
from evl_cache.store.format.size import CacheSize
from evl_cache.store.objects.address import is_url
from evl_cache.store.objects.objects import open_objects


@dataclass(frozen=True, kw_only=True)
class CachePart:
    """The base of a cache, or what was added to it, as the cache of its own that it is.

    Attributes:
        place: its directory or URL.
        description: what it says of itself.
        box: what it holds of all.
        side: what it added: layers, views or clips; empty for the base.
    """

    place: str | Path
    description: CacheDescription
    box: Box
    side: str = ""

    @property
    def path(self) -> Path:
        """Its directory."""
        return Path(self.place)

    @property
    def spec(self) -> CacheSpec:
        """What it holds."""
        return self.description.spec

    @property
    def starts_clips(self) -> bool:
        """Whether no part before it has its clips."""
        return self.side in ("", CLIPS)


@dataclass(frozen=True, kw_only=True)
class CacheParts:
    """A cache and what was added to it.

    Attributes:
        parts: the base first.
        spec: what all hold together.
        grown: what names the additions; None where there are none.
    """

    parts: tuple[CachePart, ...]
    spec: CacheSpec
    grown: Grown | None

    @property
    def box(self) -> Box:
        """What all hold."""
        base = self.parts[0].spec
        return Box.of(base) if self.grown is None else self.grown.boxes(base)[-1][1]

    def clips(self) -> Iterator[Clip]:
        """Yield all clips, in order. Raises: CacheDamaged."""
        for part in self.parts:
            if part.starts_clips:
                yield from read_clips(open_objects(part.place), part.description)


def cache_parts(place: str | Path) -> CacheParts:
    """Return the base of a cache, at a directory or URL, and what was added to it.

    Raises: CacheError where there is no cache; CacheDamaged where a description or `grown.json` is not intact.
    """
    objects = open_objects(place)
    description = read_description(objects)
    base = whole = description.spec
    parts = [CachePart(place=place, description=description, box=Box.of(base))]
    grown = find_grown(objects, base)
    if grown is None:
        return CacheParts(parts=tuple(parts), spec=base, grown=None)
    for addition, (side, box) in zip(grown.additions, grown.boxes(base), strict=True):
        where = place_of(place, addition)
        try:
            found = read_description(open_objects(where))
        except NoCacheHere as error:
            raise CacheDamaged(
                f"{objects.url}/{addition.place}: holds no cache, though {GROWN_NAME} names it; bring the directory back, or "
                f"remove {GROWN_NAME} and extract again"
            ) from error
        classes = found.spec.classes if side == CLIPS else whole.classes
        whole = grown_spec(base, box, addition, classes=classes)
        parts.append(CachePart(place=where, description=found, box=addition.box, side=side))
    return CacheParts(parts=tuple(parts), spec=whole, grown=grown)


def size_together(sizes: Sequence[CacheSize]) -> CacheSize:
    """Return what belongs to a cache with what was added to it."""
    digests = [size.cache_digest for size in sizes]
    return CacheSize(
        nbytes=sum(size.nbytes for size in sizes),
        files=sum(size.files for size in sizes),
        shard_nbytes=sum(size.shard_nbytes for size in sizes),
        blocks_done=sum(size.blocks_done for size in sizes),
        cache_digest=None if None in digests else grown_digest([digest for digest in digests if digest]),
    )


def place_of(place: str | Path, addition: Addition) -> str | Path:
    """Return the directory or URL of an addition to the cache at a place. Raises: CacheError for a link."""
    found = f"{str(place).rstrip('/')}/{addition.place}"
    if is_url(found):
        return found
    check_no_links(Path(place), Path(found))
    return Path(found) if isinstance(place, Path) else found
