"""A cache that grows in place: more layers, clips or augmented views are extracted as additions, and read as one with it.

What is asked for has to hold all that is there. It is made in steps, each an addition of its own: first the layers of
what is there, then the views, then the clips; so no sample is decoded twice for one command.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evl_cache.clips import Clip, ClipList
from evl_cache.errors import NoCacheHere, UsageError
from evl_cache.extract.job import ExtractionJob
from evl_cache.notation import format_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    Addition,
    Box,
    CacheParts,
    FeatureCache,
    addition_name,
    addition_spec,
    cache_parts,
    grown_spec,
    place_of,
)

_MAY_GROW = ("layers", "num_clips", "content_id", "classes", "views.train_views", "block_clips", "feature_id")
_TEST_VIEWS = ("views.temporal_views", "views.spatial_views")


@dataclass(frozen=True, kw_only=True)
class GrowthStep:
    """One of the caches that a grown cache is made of.

    Attributes:
        job: makes it, or finds it done.
        addition: how it is named once it is complete; None for what readers see already.
        told: what it adds, for people.
    """

    job: ExtractionJob
    addition: Addition | None = None
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a job is done in a cache that lacks some of it, or that has grown before.

    Attributes:
        job: what was asked for, in the order of clips and with the views that the cache has in the end.
        steps: in their order: what is there first.
    """

    job: ExtractionJob
    steps: tuple[GrowthStep, ...]

    @property
    def told(self) -> list[str]:
        """What is added, a line each."""
        return [step.told for step in self.steps if step.told]


def plan_growth(job: ExtractionJob) -> Growth | None:
    """Return how a cache grows into what a job asks for; None where it is not there, or no other than that.

    Raises: UsageError where another cache is there, and cannot grow into this one.
    """
    try:
        there = cache_parts(job.cache_path)
    except NoCacheHere:
        return None
    base = there.parts[0].spec
    # An older rule stays the cache's; what is made now is marked as being by today's.
    frame_rule = min(job.spec.frame_rule, base.frame_rule)
    asked = replace(job.spec, frame_rule=frame_rule, chunk_keys=base.chunk_keys)
    differences = {_field(difference) for difference in asked.differences(base)}
    if not differences:
        return None if there.grown is None else _Planner(_as_it_is(job, there), there).plan()
    if there.grown is None and differences - {*_MAY_GROW, *_TEST_VIEWS}:
        return None  # another cache, as `create_cache` tells
    return _Planner(replace(job, spec=asked), there).plan()


def _as_it_is(job: ExtractionJob, there: CacheParts) -> ExtractionJob:
    """Return the job on all that a grown cache holds: its base's own command goes over the additions, too."""
    clips = list(there.clips())
    given = {clip.id: clip for clip in job.clips.clips}
    listed = tuple(given.get(clip.id, clip) for clip in clips)
    return replace(
        job,
        spec=there.spec,
        clips=replace(job.clips, clips=listed, classes=there.spec.classes),
    )


class _Planner:
    """Finds the steps from what is there to what is asked for."""

    def __init__(self, job: ExtractionJob, there: CacheParts) -> None:
        self._job, self._there = job, there
        self._box = there.box
        self._given = {clip.id: clip for clip in job.clips.clips}

    def plan(self) -> Growth:
        self._check_features()
        clips = self._clips()
        job, spec = self._job, self._job.spec
        steps = list(self._steps_there(clips))
        wanted = Box(clips=range(len(clips)), views=range(spec.views.per_clip), layers=spec.layers)
        base, box, whole = self._there.parts[0].spec, self._box, self._there.spec
        sides: list[Box] = []
        if more := tuple(layer for layer in wanted.layers if layer not in box.layers):
            sides.append(replace(box, layers=more))
        if len(wanted.views) > len(box.views):
            sides.append(
                Box(clips=box.clips, views=range(len(box.views), len(wanted.views)), layers=wanted.layers)
            )
        if len(clips) > len(box.clips):
            sides.append(replace(wanted, clips=range(len(box.clips), len(clips))))
        if sides:
            self._check_whole()
        for added in sides:
            side, box = box.grown_by(added)
            listed = ClipList(
                clips=tuple(clips[: len(box.clips)]), classes=spec.classes, source=job.clips.source
            )
            classes = spec.classes if side == "clips" else whole.classes
            addition = Addition(
                name="",
                cache_digest="",
                box=added,
                content_id=listed.content_id,
                block_clips=spec.block_clips if side == "views" else whole.block_clips,
            )
            whole = grown_spec(base, box, addition, classes=classes)
            steps.append(self._step(side, addition, whole, clips))
        grown = ClipList(clips=tuple(clips), classes=whole.classes, source=job.clips.source)
        return Growth(job=replace(job, spec=whole, clips=grown), steps=tuple(steps))

    def _step(self, side: str, addition: Addition, whole: CacheSpec, clips: Sequence[Clip]) -> GrowthStep:
        """The step that makes one addition."""
        added = addition.box
        own = tuple(clips[added.clips.start : added.clips.stop])
        listed = replace(self._job.clips, clips=own, classes=whole.classes)
        spec = addition_spec(whole, added, content_id=listed.content_id)
        addition = replace(addition, name=addition_name(side, spec, added))
        place = Path(place_of(self._job.cache_path, addition))
        job = replace(self._job, cache_path=place, spec=spec, clips=listed)
        what = {
            "layers": f"layers {format_layers(added.layers)} of {len(own):,} clips",
            "views": f"views {added.views.start + 1} to {added.views.stop} of {len(own):,} clips",
            "clips": f"{len(own):,} clips",
        }[side]
        return GrowthStep(job=job, addition=addition, told=f"adds {what} to {self._job.cache_path}")

    def _steps_there(self, clips: Sequence[Clip]) -> Iterator[GrowthStep]:
        for part in self._there.parts:
            own = tuple(clips[row] for row in part.box.clips)
            listed = replace(self._job.clips, clips=own, classes=part.spec.classes)
            yield GrowthStep(job=replace(self._job, cache_path=part.path, spec=part.spec, clips=listed))

    def _clips(self) -> list[Clip]:
        """The clips that the cache will have, in order: those that are there, then the others as they are listed.

        Raises: UsageError where some that are there are not listed, or not under their labels.
        """
        there = list(self._there.clips())
        gone = [clip.id for clip in there if clip.id not in self._given]
        if gone:
            raise self._another(
                f"the list lacks {len(gone)} of its clips, such as {gone[0]!r}: a cache keeps its clips"
            )
        before, now = self._there.spec.classes, self._job.spec.classes
        if now[: len(before)] != before:
            raise self._another(
                "the list numbers its classes otherwise: new classes can be added behind those that are there, if they come "
                "last in the list's numbering"
            )
        for clip in there:
            if self._given[clip.id].label != clip.label:
                raise self._another(
                    f"clip {clip.id!r} has label {self._given[clip.id].label}, not {clip.label}"
                )
            if self._given[clip.id].segment != clip.segment:
                raise self._another(
                    f"clip {clip.id!r} is {_part_of(self._given[clip.id])} in the list, not {_part_of(clip)}"
                )
        known = {clip.id for clip in there}
        return [
            *(self._given[clip.id] for clip in there),
            *(clip for clip in self._job.clips.clips if clip.id not in known),
        ]

    def _check_features(self) -> None:
        """Check that nothing differs but what can be added. Raises: UsageError."""
        theirs, asked = self._there.spec, self._job.spec
        others = {_field(d) for d in asked.differences(theirs)} - set(_MAY_GROW)
        if others:
            is_of_views = bool(others.intersection(_TEST_VIEWS))
            raise self._another("each test view depends on how many there are" if is_of_views else "")
        lost = [layer for layer in theirs.layers if layer not in asked.layers]
        if lost:
            raise self._another(
                f"it has layers {format_layers(theirs.layers)} and keeps them: give these too, or take fewer with pull --layers"
            )
        views = theirs.views.train_views, asked.views.train_views
        if views[0] != views[1] and (not all(views) or views[1] < views[0]):
            raise self._another(f"it has {theirs.views.summary} views of a clip, and keeps them")

    def _check_whole(self) -> None:
        """Check that what is there can be added to. Raises: UsageError."""
        path, spec = self._job.cache_path, self._there.spec
        there = FeatureCache(path)
        if not (there.is_complete and there.has_manifest):
            raise UsageError(
                f"{path} is not complete, and only a complete cache grows; run first the command that it was begun with "
                f"(layers {format_layers(spec.layers)}, {spec.num_clips} clips)"
            )
        if there.by_older_rule:
            raise UsageError(
                f"{path} has frames that an older rule chose, which what is added would not have; run first the command "
                "that it was made with, with --retry-doubtful"
            )

    def _another(self, why: str) -> UsageError:
        differences = self._job.spec.differences(self._there.spec)
        shown = "; ".join(d for d in differences if not d.startswith("feature_id"))
        return UsageError(
            f"{self._job.cache_path} holds another cache ({shown[:400]}){': ' if why else ''}{why}; "
            "choose another --cache, or the options it was made with"
        )


def _part_of(clip: Clip) -> str:
    return "a whole video" if clip.segment is None else f"segment {clip.segment} ({clip.segment.unit})"


def _field(difference: str) -> str:
    return difference.partition(":")[0]
