"""A grown cache read as one: every sample and layer is read from the cache that holds it.

A member is the base or an addition, each a whole cache. L layers. Rows are those of the grown cache; a member has its own,
which its box translates.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from evl_cache.attention_maps import MapProjection
from evl_cache.clips import Clip
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store.format.clip_table import ClipTable
from evl_cache.store.format.description import CacheDescription, check_labels, read_clips
from evl_cache.store.format.grown import CLIPS, LAYERS, check_addition, find_grown, grown_digest, grown_spec
from evl_cache.store.format.layout import as_range
from evl_cache.store.format.marks import Mark
from evl_cache.store.format.recomputed import read_projections
from evl_cache.store.objects.objects import open_objects
from evl_cache.store.reading.member import Member, open_member, open_place
from evl_cache.store.reading.sample_reader import Stack


@dataclass(frozen=True, kw_only=True)
class GrownCache:
    """What `FeatureCache` reads of a grown cache; threads may share it.

    Attributes:
        spec: what all members hold together, as one extraction of the same would have it.
        clips: of all members, in order.
        members: the base first.
        is_valid: bool (samples,): every member that holds a layer of it has it.
    """

    spec: CacheSpec
    clips: ClipTable
    members: tuple[Member, ...]
    is_valid: np.ndarray[Any, Any]

    @property
    def description(self) -> CacheDescription:
        """What the base says of itself, with all that there is; the origin is of the last command: it named all of it."""
        first, last = self.members[0].description, self.members[-1].description
        return replace(first, spec=self.spec, origin=last.origin)

    @property
    def num_blocks(self) -> int:
        """Blocks of all members."""
        return sum(member.spec.num_blocks for member in self.members)

    @property
    def num_done(self) -> int:
        """Those with a valid mark."""
        return sum(len(member.done.files) for member in self.members)

    @property
    def fingerprint(self) -> str:
        """Digest of the members' digests, in order."""
        return grown_digest([member.fingerprint for member in self.members])

    @property
    def has_manifest(self) -> bool:
        """Whether every member has an intact manifest."""
        return all(member.has_manifest for member in self.members)

    @property
    def index(self) -> None:
        """None: each member has its own."""

    @property
    def errors(self) -> dict[int, str]:
        """Why a clip failed, by its row: what the first member says in which it did."""
        found: dict[int, str] = {}
        for member in reversed(self.members):
            found |= {member.box.clips[row]: reason for row, reason in member.done.errors.items()}
        return found

    @property
    def damaged_marks(self) -> dict[int, str]:
        """Why a block does not exist, by its number among the blocks of all members."""
        found, before = dict[int, str](), 0
        for member in self.members:
            found |= {before + block: reason for block, reason in member.done.damaged_marks.items()}
            before += member.spec.num_blocks
        return found

    @property
    def provenance(self) -> Counter[tuple[str, tuple[int, int]]]:
        """Number of clips by (decoder, source (height, width)); each clip counts once."""
        found: Counter[tuple[str, tuple[int, int]]] = Counter()
        for member in self.members:
            if member.starts_clips:
                found.update(member.done.provenance)
        return found

    @property
    def by_older_rule(self) -> dict[int, str]:
        """The decoder of each clip of which an older rule chose frames, by its row."""
        found: dict[int, str] = {}
        for member in reversed(self.members):
            found |= {member.box.clips[row]: decoder for row, decoder in member.done.by_older_rule.items()}
        return found

    def refresh(self) -> None:
        """See blocks that were finished, of the members there were."""
        for member in self.members:
            member.done.refresh()
        self.is_valid[:] = _valid(self.spec, self.members)

    def check_samples(self, samples: np.ndarray[Any, Any]) -> None:
        """Check that the blocks of samples are not there, or whole. Raises: CacheDamaged."""
        for member in self.members:
            own = member.own_samples(samples, self.spec.views.per_clip)
            member.done.check_samples(own[own >= 0])

    def why_not_served(self, sample: int, clips: Sequence[Clip], place: str) -> CacheError:
        """Return the error of asking for a sample that is not valid."""
        row = sample // self.spec.views.per_clip
        if row in (errors := self.errors):
            return CacheError(
                f"sample {sample} of {place}: its clip {clips[row].id!r} failed ({errors[row]}); see is_valid"
            )
        for member in self.members:
            own = int(member.own_samples(np.asarray([sample]), self.spec.views.per_clip)[0])
            block = own // member.spec.block_samples
            if own >= 0 and block in member.done.damaged_marks:
                return CacheDamaged(member.done.damaged_marks[block])
        return CacheError(f"sample {sample} of {place} is not extracted yet; run the extract command again")

    def read(
        self, stacks: Sequence[Stack], wanted: Sequence[tuple[int, int]], positions: Sequence[int]
    ) -> None:
        """Read as `SampleReader.read`; rows and positions are the grown cache's. Raises: CacheDamaged."""
        for member, chosen, own_positions, pairs in self._shares(wanted, positions):
            parts = [(name, stack[chosen], differenced) for name, stack, differenced in stacks]
            member.samples.read(parts, pairs, own_positions)

    def prefetch(self, wanted: Iterable[int], positions: Sequence[int], names: Iterable[str]) -> None:
        """Begin to fetch what `read` will read, of the arrays named, where it lies behind URLs."""
        pairs, names = [(0, sample) for sample in wanted], tuple(names)
        for member, _, own_positions, own in self._shares(pairs, positions):
            member.samples.prefetch((sample for _, sample in own), own_positions, names)

    def _shares(
        self, wanted: Sequence[tuple[int, int]], positions: Sequence[int]
    ) -> Iterable[tuple[Member, slice, Sequence[int], list[tuple[int, int]]]]:
        """Yield what is read from each member: places along the stacks' layers, its positions, and its pairs."""
        samples = np.fromiter((sample for _, sample in wanted), np.int64, len(wanted))
        for member, runs in self._layers_of(tuple(positions)):
            own = member.own_samples(samples, self.spec.views.per_clip).tolist()
            pairs = [(slot, at) for (slot, _), at in zip(wanted, own, strict=True) if at >= 0]
            for chosen, own_positions in runs if pairs else ():
                yield member, chosen, own_positions, pairs

    def _layers_of(
        self, positions: tuple[int, ...]
    ) -> list[tuple[Member, list[tuple[slice, Sequence[int]]]]]:
        """Return for each member the runs of layers that are read from it: where they go, and where they lie."""
        known = self._routes.get(positions)
        if known is None:
            layers = [self.spec.stored_layers[position] for position in positions]
            known = [(member, list(_runs(layers, member.owned))) for member in self.members]
            known = self._routes[positions] = [(member, runs) for member, runs in known if runs]
        return known

    @cached_property
    def _routes(self) -> dict[tuple[int, ...], list[tuple[Member, list[tuple[slice, Sequence[int]]]]]]:
        return {}

    def intact_mark(self, block: int) -> Mark | None:
        """Raise UsageError: its blocks are those of several caches, each with numbers of its own."""
        raise UsageError("a cache that has grown has no block of one number; read those of its members")

    def close(self) -> None:
        """Let go of every open file."""
        for member in self.members:
            member.samples.close()

    def end_waits(self) -> None:
        """End what waits for a server now, in whatever thread: it raises WaitEnded."""
        for member in self.members:
            member.samples.end_waits()

    def projections(self) -> dict[int, MapProjection]:
        """Return what makes maps of each layer, where they are not stored. Raises: CacheDamaged."""
        found: dict[int, MapProjection] = {}
        for member in self.members:
            if not found.keys() >= set(member.spec.layers):
                found |= read_projections(member.path, member.spec, member.description.projections_sha256)
        return found


def open_grown(base: Member, place: str, *, trust: bool) -> GrownCache | None:
    """Return what was added to a cache, with the cache itself; None where nothing was.

    Args:
        base: the cache itself, opened.
        place: its directory or URL.

    Raises: CacheError where an addition cannot be read; CacheDamaged where it is not the one that was added.
    """
    objects = open_objects(place)
    grown = find_grown(objects, base.spec)
    if grown is None:
        return None
    whole, members, tables = base.spec, [base], [base.clips]
    for addition, (side, box) in zip(grown.additions, grown.boxes(base.spec), strict=True):
        path, copy, description = open_place(place, addition)
        classes = description.spec.classes if side == CLIPS else whole.classes
        if classes[: len(whole.classes)] != whole.classes:
            raise CacheDamaged(
                f"{objects.url}/{addition.place}: its classes are not those of {objects.url}; repair the cache"
            )
        larger = grown_spec(base.spec, box, addition, classes=classes)
        check_addition(description.spec, larger, addition, f"{objects.url}/{addition.place}")
        own = read_clips(path, description)
        members.append(
            open_member(
                path,
                description,
                own,
                addition.box,
                starts_clips=side == CLIPS,
                # What lies there already is read from there: with `recompute` also tokens of the layer below.
                stored_before=() if side != LAYERS else whole.stored_layers,
                copy=copy,
                trust=trust,
                before=members,
            )
        )
        if side == CLIPS:
            tables.append(own)
        whole = larger
    clips = tables[0]
    if len(tables) > 1:
        lines = b"".join(part for table in tables for part in table.canonical_parts())
        clips = ClipTable(lines, objects.url, labels=np.concatenate([table.labels for table in tables]))
    check_labels(clips, whole, place)
    return GrownCache(spec=whole, clips=clips, members=tuple(members), is_valid=_valid(whole, members))


def _valid(spec: CacheSpec, members: Sequence[Member]) -> np.ndarray[Any, Any]:
    """Return which samples every member has that holds a layer of them, bool (samples,)."""
    valid = np.ones((spec.num_clips, spec.views.per_clip), dtype=bool)
    for member in members:
        box = member.box
        held = valid[box.clips.start : box.clips.stop, box.views.start : box.views.stop]
        held &= member.done.is_valid.reshape(held.shape)
    return valid.reshape(-1)


def _runs(layers: Sequence[int], owned: Mapping[int, int]) -> Iterable[tuple[slice, Sequence[int]]]:
    """Yield the layers that a member owns as runs: places among `layers` that follow one another, and its positions."""
    first = 0
    while first < len(layers):
        if layers[first] not in owned:
            first += 1
            continue
        stop = first
        while stop < len(layers) and layers[stop] in owned:
            stop += 1
        yield slice(first, stop), as_range([owned[layer] for layer in layers[first:stop]])
        first = stop
