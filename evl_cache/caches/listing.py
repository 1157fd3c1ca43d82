"""What caches there are at the places one looks in: what `ls` prints."""

import contextlib
import os
import pwd
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evl_cache.caches.places import FoundCache, find_caches
from evl_cache.notation import format_layers
from evl_cache.store import MANIFEST_NAME, array_layouts, is_url, manifest_at, marked_blocks, totals_at


@dataclass(frozen=True, kw_only=True)
class ListedCache:
    """One line of the list.

    Attributes:
        place: path, or URL without credentials.
        dataset, split, model: names.
        layers, frames, views: as options take them.
        nbytes: size of the data files that are there.
        blocks_done, blocks: finished, and in all.
        owner: user whose files they are; None behind a URL.
        modified: when the newest mark or the manifest was written, ISO 8601 in UTC; None behind a URL.
        cache_digest: of a complete cache.
        frame_rule: by which its frames were chosen.
    """

    place: str
    dataset: str
    split: str
    model: str
    layers: str
    frames: int
    views: str
    clips: int
    nbytes: int
    blocks_done: int
    blocks: int
    owner: str | None
    modified: str | None
    cache_digest: str | None
    frame_rule: int

    @property
    def is_complete(self) -> bool:
        """Whether every block is done and the manifest is written."""
        return self.cache_digest is not None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "is_complete": self.is_complete}


def list_caches(places: Sequence[str]) -> Iterator[ListedCache]:
    """Yield the caches at each place, in order. Raises: CacheError where a URL cannot be read."""
    for place in places:
        for found in find_caches(place):
            yield _listed(found)


def _listed(found: FoundCache) -> ListedCache:
    spec, views = found.spec, found.spec.views
    if is_url(found.address):
        totals = totals_at(found.address, spec)
        digest, nbytes = (totals.cache_digest, totals.nbytes) if totals else (None, 0)
        done, owner, modified = (spec.num_blocks if totals else 0), None, None
    else:
        manifest = manifest_at(found.address, spec)
        digest = None if manifest is None else manifest.digest
        root = Path(found.address)
        marked = [block for block in marked_blocks(root) if block < spec.num_blocks]
        layouts = array_layouts(spec).values()
        nbytes = sum(_size(layout.shard(root, block)) for layout in layouts for block in marked)
        done = len(marked)
        owner, modified = _owner_and_time([root / MANIFEST_NAME, root / "done", root / "zarr.json"])
    return ListedCache(
        place=found.place,
        dataset=spec.dataset,
        split=spec.split,
        model=spec.tower.model,
        layers=format_layers(spec.layers),
        frames=views.frames,
        views=views.summary,
        clips=spec.num_clips,
        nbytes=nbytes,
        blocks_done=done,
        blocks=spec.num_blocks,
        owner=owner,
        modified=modified,
        cache_digest=digest,
        frame_rule=spec.frame_rule,
    )


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _owner_and_time(paths: Sequence[Path]) -> tuple[str | None, str | None]:
    """The owner and the time of the first of the files that exists, or None for both."""
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            when = datetime.fromtimestamp(found.st_mtime, tz=UTC).isoformat(timespec="seconds")
            try:
                return pwd.getpwuid(found.st_uid).pw_name, when
            except KeyError:  # of another machine
                return str(found.st_uid), when
    return None, None
