"""The caches that a grown cache is made of, each opened for reading: the base, and what was added to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.errors import CacheDamaged, NoCacheHere
from evl_cache.notation import format_layers
from evl_cache.spec import CacheSpec
from evl_cache.store.disk.file_system import check_no_links
from evl_cache.store.format.clip_table import ClipTable
from evl_cache.store.format.description import CacheDescription, read_description
from evl_cache.store.format.grown import GROWN_NAME, Addition, Box
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.format.manifest import find_manifest, manifest_at, manifest_digest
from evl_cache.store.objects.objects import DirectoryObjects, open_objects
from evl_cache.store.reading.blocks_done import BlocksDone
from evl_cache.store.reading.local_copy import LocalCopy
from evl_cache.store.reading.sample_reader import SampleReader


@dataclass(kw_only=True)
class Member:
    """One of the caches that a grown cache is made of.

    Attributes:
        path: its directory, or that of its copy.
        description: what it says of itself.
        clips: its own.
        box: what it holds of the grown cache.
        starts_clips: whether no member before it has its clips.
        owned: position of each stored layer that is read from it, by layer.
        done: its blocks.
        samples: reads its samples.
        copy: fetches it, where it lies behind a URL.
    """

    path: Path
    description: CacheDescription
    clips: ClipTable
    box: Box
    starts_clips: bool
    owned: Mapping[int, int]
    done: BlocksDone
    samples: SampleReader
    copy: LocalCopy | None

    @property
    def spec(self) -> CacheSpec:
        """What it holds."""
        return self.description.spec

    @property
    def told(self) -> str:
        """What it added, for people."""
        box = self.box
        if self.starts_clips:
            return f"clips {box.clips.start + 1} to {box.clips.stop}"
        if box.views.start:
            return f"views {box.views.start + 1} to {box.views.stop}"
        return f"layers {format_layers(box.layers)}"

    @property
    def fingerprint(self) -> str:
        """Its cache digest; of the marks there are while it has no manifest."""
        if (found := manifest_digest(self.path, self.spec)) is not None:
            return found
        manifest = find_manifest(self.path, self.spec)
        return self.done.marks_digest if manifest is None else manifest.digest

    @property
    def has_manifest(self) -> bool:
        """Whether its manifest is written, intact and its own."""
        is_proved = manifest_digest(self.path, self.spec) is not None
        return is_proved or manifest_at(self.path, self.spec) is not None

    def own_samples(self, samples: np.ndarray[Any, Any], views: int) -> np.ndarray[Any, Any]:
        """Return its rows of the grown cache's, and -1 for those that it has not. `views`: of a clip, there."""
        clip, view = samples // views, samples % views
        has = (clip >= self.box.clips.start) & (clip < self.box.clips.stop)
        has &= (view >= self.box.views.start) & (view < self.box.views.stop)
        own = (clip - self.box.clips.start) * len(self.box.views) + view - self.box.views.start
        return np.where(has, own, -1)


def base_member(
    path: Path,
    description: CacheDescription,
    clips: ClipTable,
    done: BlocksDone,
    samples: SampleReader,
    copy: LocalCopy | None,
) -> Member:
    """Return a cache that was opened as the first of the members."""
    spec = description.spec
    return Member(
        path=path,
        description=description,
        clips=clips,
        box=Box.of(spec),
        starts_clips=True,
        owned={layer: position for position, layer in enumerate(spec.stored_layers)},
        done=done,
        samples=samples,
        copy=copy,
    )


def open_place(place: str, addition: Addition) -> tuple[Path, LocalCopy | None, CacheDescription]:
    """Open the directory or URL of an addition. Raises: CacheDamaged where there is nothing."""
    objects = open_objects(place)
    try:
        if isinstance(objects, DirectoryObjects):
            path, copy = Path(place) / addition.place, None
            check_no_links(Path(place), path)
        else:
            copy = LocalCopy(f"{place.rstrip('/')}/{addition.place}")
            path = copy.path
        return path, copy, read_description(path)
    except NoCacheHere as error:
        raise CacheDamaged(
            f"{objects.url}/{addition.place}: holds no cache, though {GROWN_NAME} names it; bring the directory back, "
            f"or remove {GROWN_NAME} and extract again"
        ) from error


def open_member(
    path: Path,
    description: CacheDescription,
    clips: ClipTable,
    box: Box,
    *,
    starts_clips: bool,
    stored_before: Sequence[int],
    copy: LocalCopy | None,
    trust: bool,
    before: Sequence[Member],
) -> Member:
    """Return an addition, opened.

    Args:
        box: what it holds of the grown cache.
        starts_clips: whether no member before it has its clips.
        stored_before: layers that are read from members before it.
        copy: fetches it, where it lies behind a URL.
        trust: do not check chunks against their marks' checksums.
        before: the members before it, whose open files count as its own: a process may open so many for all of them.
    """
    spec = description.spec
    done = BlocksDone(path, spec, copy=copy)
    samples = SampleReader(
        path,
        spec,
        layouts=array_layouts(spec),
        files=done.files,
        copy=copy,
        trust=trust and copy is None,
        shards=before[0].samples.shards,
        first_block=sum(member.spec.num_blocks for member in before),
    )
    places = {layer: position for position, layer in enumerate(spec.stored_layers)}
    owned = {layer: position for layer, position in places.items() if layer not in stored_before}
    return Member(
        path=path,
        description=description,
        clips=clips,
        box=box,
        starts_clips=starts_clips,
        owned=owned,
        done=done,
        samples=samples,
        copy=copy,
    )
