"""What `extract` understands of a request, before any work: what `evl-cache check` tells, and `extract` in short.

No tower is built, no weights are fetched and nothing is written.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median_low
from typing import Any

from evl_cache.clips import Clip
from evl_cache.datasets import check_missing, describe_passed_over
from evl_cache.errors import UsageError
from evl_cache.extract.request import ExtractRequest, SplitsRead, last_layers, read_splits
from evl_cache.extract.short_clips import ShortClips, look_for_short
from evl_cache.extract.stage import make_spec
from evl_cache.notation import AUTO_STRIDE, counted
from evl_cache.spec import TowerSpec, ViewSpec
from evl_cache.store import projections_nbytes, sample_nbytes
from evl_cache.towers import tower_shape

FIRST_CLIPS = 3
MOST_NAMED = 1000  # ids in a report
_MOST_CLASSES = 12  # that are shown with their counts; of more the ends are
_END_CLASSES = 3
_FIRST_CLASSES = 3


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """What was understood of one split.

    Attributes:
        split: its name.
        source: where its clips were read.
        clips: how many.
        clips_by_class: how many of each class, in the order of class numbers; classes may have none.
        first: (id, class name) of the first clips.
        views: of each clip.
        passed_over: files by their endings, as `ClipList` has them.
        remarks: as `ClipList` has them.
        short: clips shorter than a view; None where it cannot be, or was not looked for.
    """

    split: str
    source: str
    clips: int
    clips_by_class: Mapping[str, int]
    first: tuple[tuple[str, str], ...]
    views: ViewSpec
    passed_over: Mapping[str, int]
    remarks: tuple[str, ...]
    short: ShortClips | None

    @property
    def title(self) -> str:
        """Return clips and classes as a person reads them."""
        without = sum(not count for count in self.clips_by_class.values())
        less = f" ({without} of them without a clip)" if without else ""
        return f"{self.split}: {counted(self.clips, 'clip')} of {counted(len(self.clips_by_class), 'class')}{less}"

    @property
    def notes(self) -> list[str]:
        """Return what a person should know before the work begins."""
        notes = []
        if self.passed_over:
            notes.append(
                f"passed over {describe_passed_over(self.passed_over)}, no videos by their endings; "
                "--dataset list takes files of any ending"
            )
        notes += self.remarks
        if self.short is not None:
            notes += self.short.told()
        if self.views.stride == AUTO_STRIDE and (self.views.temporal_views > 1 or self.views.train_views > 1):
            notes.append(
                "with --stride auto each view lies over the whole clip: several over time have nearly the same frames"
            )
        return notes

    @property
    def in_short(self) -> list[str]:
        """Return the lines that `extract` says before it begins."""
        names = [name for name, count in self.clips_by_class.items() if count]
        more = f", … {len(names) - _FIRST_CLASSES} more" if len(names) > _FIRST_CLASSES else ""
        title = f"{self.title}: {', '.join(names[:_FIRST_CLASSES])}{more}"
        return [title, *(f"{self.source}: {note}" for note in self.notes)]

    @property
    def classes_told(self) -> str:
        """Return how many clips classes have: all of few, the ends of many."""
        counts = self.clips_by_class
        if len(counts) <= _MOST_CLASSES:
            return _with_counts(counts.items())
        ordered = sorted(counts.items(), key=lambda each: -each[1])
        numbers = list(counts.values())
        return (
            f"{_with_counts(ordered[:_END_CLASSES])}, … {len(counts) - 2 * _END_CLASSES} more, "
            f"{_with_counts(ordered[-_END_CLASSES:])} (clips of a class: {min(numbers)} to {max(numbers)}, "
            f"median {median_low(numbers)})"
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a split would cost, and what of it is not there.

    Attributes:
        samples: clips times views.
        raw_bytes: before the codec.
        expected_bytes: after the codec, as other caches were compressed.
        missing: ids of clips without a file.
        refusal: why `extract` would not begin; None where it would.
    """

    samples: int
    raw_bytes: int
    expected_bytes: int
    missing: tuple[str, ...]
    refusal: str | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was understood of a request.

    Attributes:
        root: folder of the videos.
        cache: directory that was asked for; None where it is named after its content, weights included.
        splits: each with its cost.
        in_both: ids of clips that two splits share, by id or by file.
        only_in: names of classes that have clips in one split only, by split.
    """

    root: Path
    cache: Path | None
    splits: tuple[tuple[SplitCheck, Cost], ...]
    in_both: tuple[str, ...]
    only_in: Mapping[str, tuple[str, ...]]

    @property
    def would_begin(self) -> bool:
        """Whether `extract` would begin its work."""
        return all(cost.refusal is None for _, cost in self.splits)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; lists of clips end at `MOST_NAMED`, with how many there are beside them."""
        return {
            "root": str(self.root),
            "cache": None if self.cache is None else str(self.cache),
            "would_begin": self.would_begin,
            "splits": [
                {
                    **{k: v for k, v in asdict(split).items() if k not in ("views", "first")},
                    "first": [{"id": clip, "label": label} for clip, label in split.first],
                    "views": split.views.to_json(),
                    **_named("missing", cost.missing),
                    **{k: v for k, v in asdict(cost).items() if k != "missing"},
                }
                for split, cost in self.splits
            ],
            **_named("in_both", self.in_both),
            "only_in": {split: list(names) for split, names in self.only_in.items()},
        }


def check(request: ExtractRequest) -> Check:
    """Return what `extract` with the same request understands. Raises: UsageError where that cannot be read."""
    read = read_splits(request)
    shape = tower_shape(request.model)
    costs = [_cost(request, read, split, shape=shape) for split in read.lists]
    splits = check_splits(read)
    lists = {split: clips.clips for split, clips in read.lists.items()}
    return Check(
        root=read.root,
        cache=request.cache,
        splits=tuple(zip(splits, costs, strict=True)),
        in_both=tuple(_in_both(lists, read.root)),
        only_in=_only_in(splits),
    )


def check_splits(read: SplitsRead) -> list[SplitCheck]:
    """Return what was understood of each split, after a look at headers of its videos."""
    return [_split_check(read, split) for split in read.lists]


def _split_check(read: SplitsRead, split: str) -> SplitCheck:
    clips, views = read.lists[split], read.views_of(split)
    missing = frozenset(clip.id for clip in read.missing[split])
    counts = Counter(clip.label for clip in clips.clips)
    return SplitCheck(
        split=split,
        source=clips.source,
        clips=len(clips.clips),
        clips_by_class={name: counts[label] for label, name in enumerate(clips.classes)},
        first=tuple((clip.id, clips.classes[clip.label]) for clip in clips.clips[:FIRST_CLIPS]),
        views=views,
        passed_over=dict(clips.passed_over),
        remarks=clips.remarks,
        short=look_for_short(clips.clips, read.root, views, skipped=missing),
    )


def _cost(request: ExtractRequest, read: SplitsRead, split: str, *, shape: TowerSpec) -> Cost:
    clips = read.lists[split]
    spec = make_spec(
        clips,
        dataset=request.dataset,
        split=split,
        tower=shape,
        layers=request.layers or last_layers(shape.blocks),
        views=read.views_of(split),
        tokens=request.tokens,
        maps=request.maps,
        codec=request.codec,
    )
    raw, expected = sample_nbytes(spec)
    once = projections_nbytes(spec)
    return Cost(
        samples=spec.num_samples,
        raw_bytes=raw * spec.num_samples + once,
        expected_bytes=expected * spec.num_samples + once,
        missing=tuple(clip.id for clip in read.missing[split]),
        refusal=_refusal(read, split, request.allow_missing_percent),
    )


def _refusal(read: SplitsRead, split: str, allow_percent: float) -> str | None:
    """Return what `extract` would say of missing clips; None where so many are allowed."""
    try:
        check_missing(read.lists[split], read.root, allow_percent=allow_percent, missing=read.missing[split])
    except UsageError as error:
        return str(error)
    return None


def _in_both(lists: Mapping[str, Sequence[Clip]], root: Path) -> list[str]:
    """Return ids of clips that a later split shares with an earlier one."""
    shared: dict[str, None] = {}
    for one, other in combinations(lists.values(), 2):
        ids = {clip.id for clip in one}
        files = {_file(clip, root) for clip in one}
        shared |= dict.fromkeys(clip.id for clip in other if clip.id in ids or _file(clip, root) in files)
    return list(shared)


def _file(clip: Clip, root: Path) -> tuple[str, str]:
    return os.path.normpath(root / clip.path), str(clip.segment or "")


def _only_in(splits: Sequence[SplitCheck]) -> dict[str, tuple[str, ...]]:
    """Return classes with clips in one split only, by name; nothing of a single split."""
    if len(splits) < 2:
        return {}
    filled = {each.split: [name for name, count in each.clips_by_class.items() if count] for each in splits}
    times = Counter(name for names in filled.values() for name in names)
    only = {split: tuple(name for name in names if times[name] == 1) for split, names in filled.items()}
    return {split: names for split, names in only.items() if names}


def _named(name: str, ids: Sequence[str]) -> dict[str, Any]:
    return {name: list(ids[:MOST_NAMED]), f"{name}_total": len(ids)}


def _with_counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name}\N{NO-BREAK SPACE}{count}" for name, count in counts)
