"""What caches there are at the places one looks in: what `ls` prints."""

import contextlib
import os
import pwd
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evl_cache.caches.places import FoundCache, NotSeen, find_caches, look_at_places, look_together
from evl_cache.notation import format_layers
from evl_cache.store import GROWN_NAME, MANIFEST_NAME, is_url, totals_at, totals_together


@dataclass(frozen=True, kw_only=True)
class ListedCache:
    """One line of the list.

    Attributes:
        place: path, or URL without credentials.
        dataset, split, model: names.
        layers, frames, views: as options take them.
        nbytes: size of the data files of the blocks done.
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


def list_caches(places: Sequence[str | Path] | None = None) -> Iterator[ListedCache | NotSeen]:
    """Yield the caches at each place, in order, and what could not be looked at; all places are looked at together.

    Args:
        places: None for those of `$EVL_CACHE_ROOT`.

    Raises: WaitEnded.
    """
    return look_at_places(places, _listed_at)


def _listed_at(place: str | Path) -> Iterator[ListedCache | NotSeen]:
    return look_together(_listed, list(find_caches(place)), address_of=_address_of)


def _address_of(seen: FoundCache | NotSeen) -> str:
    return seen.address if isinstance(seen, FoundCache) else seen.place


def _listed(found: FoundCache | NotSeen) -> ListedCache | NotSeen:
    if isinstance(found, NotSeen):
        return found
    spec, views = found.spec, found.spec.views
    size = totals_together([totals_at(part.place, part.spec) for part in found.parts])
    owner, modified = None, None
    if not is_url(found.address):
        root = Path(found.address)
        owner, modified = _owner_and_time(
            [root / GROWN_NAME, root / MANIFEST_NAME, root / "done", root / "zarr.json"]
        )
    return ListedCache(
        place=found.place,
        dataset=spec.dataset,
        split=spec.split,
        model=spec.tower.model,
        layers=format_layers(spec.layers),
        frames=views.frames,
        views=views.summary,
        clips=spec.num_clips,
        nbytes=size.nbytes,
        blocks_done=size.blocks_done,
        blocks=sum(part.spec.num_blocks for part in found.parts),
        owner=owner,
        modified=modified,
        cache_digest=size.cache_digest,
        frame_rule=spec.frame_rule,
    )


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
