"""What was added to a cache: `grown.json`, which names every addition, and what all of them hold together.

A grown cache is a box of clips, views of each clip, and layers. The base, which is what lies in the cache's own
directory, is a box; every addition is a whole cache in `additions/<name>/`, and makes the box larger along one of its
three sides: more layers of all that is there, more views, or more clips. So every layer of every sample lies in one
place and in no other, whatever was added in whatever order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evl_cache.canonical_json import digest, digest_matches, signed_json
from evl_cache.errors import CacheDamaged
from evl_cache.spec import CacheSpec
from evl_cache.store.objects.objects import Objects, objects_of
from evl_cache.untrusted.json_text import parse_json
from evl_cache.untrusted.spec_limits import check_spec

GROWN_NAME, ADDITIONS_NAME = "grown.json", "additions"
SECOND_COPY_NAME = f"{ADDITIONS_NAME}/{GROWN_NAME}"
GROWN_VERSION = 1
MOST_ADDITIONS, MOST_GROWN_NBYTES = 1000, 4 << 20
_NAME = re.compile(r"[a-z]+[a-z0-9-]{0,100}")
_SHA256 = re.compile("[0-9a-f]{64}")
LAYERS, VIEWS, CLIPS = "layers", "views", "clips"


@dataclass(frozen=True, kw_only=True)
class Box:
    """What a cache, or an addition, holds of a grown cache.

    Attributes:
        clips: rows of its clips.
        views: numbers of its views of a clip.
        layers: of the tower, shallow to deep.
    """

    clips: range
    views: range
    layers: tuple[int, ...]

    @classmethod
    def of(cls, spec: CacheSpec) -> "Box":
        """Return the box of a cache that stands alone."""
        return cls(clips=range(spec.num_clips), views=range(spec.views.per_clip), layers=spec.layers)

    def grown_by(self, more: "Box") -> tuple[str, "Box"]:
        """Return along which side an addition makes this box larger, and the larger box. Raises: ValueError."""
        same = (more.clips == self.clips, more.views == self.views, more.layers == self.layers)
        if same[:2] == (True, True) and more.layers and not set(more.layers) & set(self.layers):
            return LAYERS, replace(self, layers=tuple(sorted({*self.layers, *more.layers})))
        if same == (True, False, True) and more.views and more.views.start == self.views.stop:
            return VIEWS, replace(self, views=range(more.views.stop))
        if same == (False, True, True) and more.clips and more.clips.start == self.clips.stop:
            return CLIPS, replace(self, clips=range(more.clips.stop))
        raise ValueError(f"{more} continues no side of {self}")


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One addition, as `grown.json` names it.

    Attributes:
        name: of its directory.
        cache_digest: of its manifest when it was added, or last repaired.
        box: what it holds.
        content_id: of all clips of the grown cache once it was added.
        block_clips: of one extraction of all that was there then; epochs are drawn by it.
    """

    name: str
    cache_digest: str
    box: Box
    content_id: str
    block_clips: int

    @property
    def place(self) -> str:
        """Where it lies, relative to the cache."""
        return f"{ADDITIONS_NAME}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Grown:
    """The content of `grown.json`.

    Attributes:
        base: feature id and content id of the base.
        cache_digest: of the base's manifest.
        additions: in the order in which they were added.
    """

    base: tuple[str, str]
    cache_digest: str
    additions: tuple[Addition, ...]

    def boxes(self, base: CacheSpec) -> list[tuple[str, Box]]:
        """Return for each addition which side it continues, and the box of all that was there once it was added.

        Raises: ValueError where one continues none.
        """
        box, out = Box.of(base), []
        for addition in self.additions:
            side, box = box.grown_by(addition.box)
            out.append((side, box))
        return out


def grown_spec(base: CacheSpec, box: Box, addition: Addition, *, classes: Sequence[str]) -> CacheSpec:
    """Return the spec of a cache that grew: as one extraction of the same would have it.

    Args:
        box: what it holds.
        addition: the last one.
        classes: of all its clips.

    Raises: CacheError where it is larger than readers take.
    """
    views = base.views
    if len(box.views) != views.per_clip:
        views = replace(views, train_views=len(box.views))
    whole = replace(
        base,
        classes=tuple(classes),
        views=views,
        layers=box.layers,
        num_clips=len(box.clips),
        content_id=addition.content_id,
        block_clips=addition.block_clips,
    )
    check_spec(whole.to_json())  # each of many additions may be within its limits
    return whole


def addition_spec(whole: CacheSpec, box: Box, *, content_id: str) -> CacheSpec:
    """Return the spec of the cache that an addition is.

    Args:
        whole: of the grown cache with it.
        box: what it holds.
        content_id: of its own clips.
    """
    views, block_clips = whole.views, whole.block_clips
    if len(box.views) != views.per_clip:
        views = replace(views, train_views=len(box.views), first_view=box.views.start)
        block_clips = max(1, whole.block_samples // len(box.views))
    return replace(
        whole,
        views=views,
        layers=box.layers,
        num_clips=len(box.clips),
        content_id=content_id,
        block_clips=block_clips,
    )


def addition_name(side: str, spec: CacheSpec, box: Box) -> str:
    """Return the name of an addition's directory: what it adds, and a digest of what it holds."""
    if side == LAYERS:
        told = f"{box.layers[0]}-{box.layers[-1]}"
    else:
        rows = box.views if side == VIEWS else box.clips
        told = f"{rows.start}-{rows.stop - 1}"
    return f"{side}-{told}-{_identity(spec)}"


def _identity(spec: CacheSpec) -> str:
    return digest([spec.feature_id, spec.content_id, list(spec.layers)])[:8]


def grown_digest(digests: Sequence[str]) -> str:
    """Return the cache digest of a cache by those of its base and its additions: its own where nothing was added."""
    return digests[0] if len(digests) == 1 else digest(list(digests))


def grown_content(grown: Grown) -> bytes:
    """Return the bytes of `grown.json`."""
    rows = [
        {
            "name": addition.name,
            "cache_digest": addition.cache_digest,
            "clips": [addition.box.clips.start, addition.box.clips.stop],
            "views": [addition.box.views.start, addition.box.views.stop],
            "layers": list(addition.box.layers),
            "content_id": addition.content_id,
            "block_clips": addition.block_clips,
        }
        for addition in grown.additions
    ]
    feature_id, content_id = grown.base
    base = {"feature_id": feature_id, "content_id": content_id, "cache_digest": grown.cache_digest}
    return signed_json({"additions": rows, "base": base, "version": GROWN_VERSION})[0]


def find_grown(place: Path | Objects, spec: CacheSpec, *, name: str = GROWN_NAME) -> Grown | None:
    """Return what was added to a cache; None where nothing was.

    Args:
        spec: the base's.
        name: of the file: its second copy has another.

    Raises: CacheDamaged where the file is not intact, or tells of another cache.
    """
    objects = objects_of(place)
    where = f"{objects.url}/{name}"
    try:
        written = objects.get(name, most_nbytes=MOST_GROWN_NBYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CacheDamaged(f"{where}: cannot be read ({error}); repair the cache") from error
    return parse_grown(written, spec, where)


def check_not_lost(place: Path, spec: CacheSpec, grown: Grown | None) -> None:
    """Check that a cache to which nothing was added has no second copy that names additions. Raises: CacheDamaged."""
    if grown is None and find_grown(place, spec, name=SECOND_COPY_NAME) is not None:
        raise CacheDamaged(
            f"{place / GROWN_NAME}: is not there, though {SECOND_COPY_NAME} is; repair the cache, or remove "
            f"{ADDITIONS_NAME} if nothing is to be added to it"
        )


def parse_grown(written: bytes, spec: CacheSpec, where: str) -> Grown:
    """Return the content of a file's bytes. Raises: as `find_grown`."""
    try:
        content = parse_json(written)
        if not isinstance(content, dict) or not digest_matches(content, written):
            raise CacheDamaged(f"{where}: its digest does not match; repair the cache")
        if content["version"] != GROWN_VERSION:
            raise CacheDamaged(
                f"{where}: is of version {str(content['version'])[:20]}, this evl-cache reads {GROWN_VERSION}: install "
                "the version that wrote it"
            )
        base, rows = content["base"], content["additions"]
        if not 0 < len(rows) <= MOST_ADDITIONS:
            raise ValueError(f"{len(rows)} additions")
        grown = Grown(
            base=(str(base["feature_id"]), str(base["content_id"])),
            cache_digest=_matching(_SHA256, base["cache_digest"]),
            additions=tuple(map(_addition, rows)),
        )
        if len({addition.name for addition in grown.additions}) != len(rows):
            raise ValueError("an addition is named twice")
        if grown.base == (spec.feature_id, spec.content_id):
            grown.boxes(spec)
            return grown
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(f"{where}: names no additions ({error!r}); repair the cache") from error
    raise CacheDamaged(f"{where}: tells of additions to another cache; repair the cache")


def check_addition(found: CacheSpec, whole: CacheSpec, addition: Addition, where: str) -> None:
    """Check that the cache at an addition's place is the one that is named. Raises: CacheDamaged naming what differs.

    Args:
        found: what that cache holds.
        whole: the spec of the grown cache with this addition; its classes may be more.
    """
    wanted = addition_spec(whole, addition.box, content_id=found.content_id)
    wanted = replace(wanted, classes=whole.classes[: len(found.classes)], block_clips=found.block_clips)
    if differences := wanted.differences(found):
        raise CacheDamaged(
            f"{where}: is not the addition that {GROWN_NAME} names ({'; '.join(differences[:4])}); repair the cache"
        )
    # The name has a digest of the addition's clips, which `grown.json` tells nowhere else.
    if not addition.name.endswith(f"-{_identity(found)}"):
        raise CacheDamaged(
            f"{where}: is not the addition that {GROWN_NAME} names (it holds other clips); bring the directories back under "
            "their own names"
        )


def _addition(row: Mapping[str, Any]) -> Addition:
    layers = tuple(map(_number, row["layers"]))
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers {layers}")
    return Addition(
        name=_matching(_NAME, row["name"]),
        cache_digest=_matching(_SHA256, row["cache_digest"]),
        box=Box(clips=_range(row["clips"]), views=_range(row["views"]), layers=layers),
        content_id=str(row["content_id"]),
        block_clips=max(1, _number(row["block_clips"])),
    )


def _range(value: Sequence[Any]) -> range:
    first, stop = map(_number, value)
    return range(first, stop)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 10**9:
        raise ValueError(f"{value!r} is no number")
    return value


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form {pattern.pattern}")
    return value
