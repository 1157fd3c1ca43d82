"""Clips and their labels: the list whose order every cache keeps. The room `datasets` reads lists from disks."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from sys import intern
from typing import Any

from evl_cache.canonical_json import digest_of_list
from evl_cache.errors import CacheError, UsageError

TRAIN_SPLITS = ("train",)
VAL_SPLITS = ("val", "validation", "test")
SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
}
MAX_CLASSES = 100_000  # a larger number in a list is a number of frames or an id, not a class
_NUMBER = re.compile(r"\+?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_NEGATIVE = re.compile(r"[-\u2212](?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_NUMBERED = re.compile(r"(?P<name>[a-z]*)(?:[ _-]?0?(?P<fold>[1-3]))?")


SEGMENT_UNITS = ("seconds", "frames")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A part of a video: the frames shown from `start` on, and before `end`.

    Attributes:
        unit: `seconds` since the video's first frame is shown, or `frames` counted from 0.
        start: first second or frame, at least 0.
        end: the second or frame that is no longer part of it; None for the video's end.

    Raises: UsageError for another unit, a negative start, or an end that is not after the start.
    """

    unit: str
    start: float
    end: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in SEGMENT_UNITS:
            raise UsageError(f"segment in {self.unit!r}; expected one of {', '.join(SEGMENT_UNITS)}")
        bounds = [self.start] if self.end is None else [self.start, self.end]
        if not all(map(math.isfinite, bounds)) or self.start < 0:
            raise UsageError(f"segment {self}; expected a start of at least 0 and finite numbers")
        if self.unit == "frames" and any(bound != int(bound) for bound in bounds):
            raise UsageError(f"segment {self} in frames; expected whole numbers")
        if self.end is not None and self.end <= self.start:
            raise UsageError(f"segment {self}; expected an end after the start")
        # One form in `clips.jsonl` and in digests, whoever gave whole numbers.
        object.__setattr__(self, "start", float(self.start))
        object.__setattr__(self, "end", None if self.end is None else float(self.end))

    def __str__(self) -> str:
        """`start-end`, as it stands behind the `#` of a clip's id; `start-` to the video's end."""
        return f"{_shortest(self.start)}-{'' if self.end is None else _shortest(self.end)}"

    def to_json(self) -> dict[str, Any]:
        """Return what a row of `clips.jsonl` has as `segment`."""
        return {"unit": self.unit, "start": self.start, "end": self.end}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Segment":
        """Return the segment of a row of `clips.jsonl`. Raises: KeyError, TypeError, ValueError for another form."""
        end = told["end"]
        return cls(
            unit=intern(str(told["unit"])),
            start=float(told["start"]),
            end=None if end is None else float(end),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One video of a data set, or a part of one.

    Attributes:
        id: unique within the list; often the path as the annotation has it, `path#start-end` of a part.
        path: of the file, absolute or relative to the data set's root.
        label: class number.
        split: `train`, `val` or another name.
        line: its line in the annotation file; None where there is no such file.
        segment: the part of the video that it is; None for all of it.
    """

    id: str
    path: str
    label: int
    split: str
    line: int | None = None
    segment: Segment | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the clip's row of `clips.jsonl`, which has a `segment` only where the clip is one."""
        row = {"id": self.id, "path": self.path, "label": self.label, "split": self.split}
        return row if self.segment is None else row | {"segment": self.segment.to_json()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Clip":
        """Return the clip of a row of `clips.jsonl`. Raises: CacheError for a row of another form."""
        try:
            clip_id, path = str(row["id"]), str(row["path"])
            if path == clip_id:  # of a million clips, one text each
                path = clip_id
            clip = cls(
                id=clip_id,
                path=path,
                label=int(row["label"]),
                split=intern(str(row["split"])),
                segment=Segment.from_json(row["segment"]) if "segment" in row else None,
            )
            if not 0 <= clip.label < MAX_CLASSES:
                raise ValueError(f"label {clip.label}")
            return clip
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise CacheError(
                f"clips.jsonl: not a clip ({error!r}); expected id, path, label, split: verify the cache"
            ) from error


@dataclass(frozen=True, kw_only=True)
class ClipList:
    """Clips in their fixed order.

    Attributes:
        clips: in order; a tuple, or a cache's own list, which parses its rows as they are asked for.
        classes: names by label.
        source: where they were read, for messages.
        is_undivided: whether what was read holds no other split: a folder without splits, an annotation file of one.
        passed_over: numbers of files that lie among the clips and are none, by their endings.
        remarks: what else a person should know before work begins, a line each.

    Raises: UsageError for an empty list, or for an id that occurs twice, with both line numbers.
    """

    clips: Sequence[Clip]
    classes: tuple[str, ...]
    source: str
    is_undivided: bool = field(default=False, compare=False)
    passed_over: Mapping[str, int] = field(default_factory=dict, compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.clips:
            raise UsageError(f"{self.source}: holds no clip; expected at least one")
        if len({clip.id for clip in self.clips}) == len(self.clips):
            return
        seen: dict[str, Clip] = {}
        for clip in self.clips:
            if clip.id in seen:
                where = f" (lines {seen[clip.id].line} and {clip.line})" if clip.line else ""
                raise UsageError(f"{self.source}: {clip.id!r} occurs twice{where}; expected each clip once")
            seen[clip.id] = clip

    @cached_property
    def content_id(self) -> str:
        """The digest of ids, labels and segments in order; paths of files do not change it."""
        return digest_of_list(
            [clip.id, clip.label] if clip.segment is None else [clip.id, clip.label, clip.segment.to_json()]
            for clip in self.clips
        )


def _shortest(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def is_negative(label: str) -> bool:
    """Whether a label is a negative number, which often marks a clip without one."""
    return _NEGATIVE.fullmatch(label) is not None


def whole_number(label: str) -> int | None:
    """Return the class number that a label is, however it is written (`2`, `2.0`, `2e+00`); None for another label."""
    number = float(label) if _NUMBER.fullmatch(label) else math.nan
    return int(number) if number.is_integer() else None


def number_labels(
    labels: Sequence[str], *, source: str, lines: Sequence[int]
) -> tuple[list[int], tuple[str, ...]]:
    """Return class numbers and class names; labels that are names are numbered in alphabetical order.

    Raises: UsageError with the line number for labels of both kinds, for a number that is negative or not whole, or for one
        of `MAX_CLASSES` or more.
    """
    distinct = list(dict.fromkeys(labels))  # of a million clips, the labels of some classes

    def where(label: str) -> str:
        return f"{source}, line {lines[labels.index(label)]}"

    for label in filter(is_negative, distinct):
        raise UsageError(
            f"{where(label)}: label {label} is no class, and often marks a clip without a label; expected "
            "class numbers from 0, or names: give the label, or leave the line out"
        )
    is_number = {label: _NUMBER.fullmatch(label) is not None for label in distinct}
    if all(is_number.values()):
        numbers = {label: whole_number(label) for label in distinct}
        for label, number in numbers.items():
            if number is None or number >= MAX_CLASSES:
                raise UsageError(
                    f"{where(label)}: label {label}; expected class numbers below {MAX_CLASSES} (names that look "
                    "like numbers are given by --classes FILE)"
                )
        found = [number for label in labels if (number := numbers[label]) is not None]
        return found, class_numbers(max(found, default=-1) + 1)
    if any(is_number.values()):
        odd = next(label for label in distinct if is_number[label] != is_number[distinct[0]])
        raise UsageError(
            f"{where(odd)}: label {odd!r} among labels like {labels[0]!r}; "
            "expected either numbers or names throughout (or all names by --classes FILE)"
        )
    classes = tuple(sorted(distinct))
    index = {name: i for i, name in enumerate(classes)}
    return [index[label] for label in labels], classes


def class_numbers(count: int) -> tuple[str, ...]:
    """Return what classes that have only numbers are called: `0`, `1`, …"""
    return tuple(str(number) for number in range(count))


def fold_of(split: object) -> int:
    """Return the fold that a split's name asks for; 1 for any other name, and for what is none."""
    try:
        return numbered_split(split)[1] if isinstance(split, str) else 1
    except UsageError:
        return 1


def normal_split(split: str) -> str:
    """Return `train`, `val` or `test` for what publishers and users write.

    Raises: UsageError for any other name.
    """
    name = SPLIT_NAMES.get(split.strip().lower())
    if name is None:
        raise UsageError(f"--split {split!r} is unknown; expected train, val (validate, validation) or test")
    return name


def numbered_split(split: str | None) -> tuple[tuple[str, ...], int]:
    """Return splits and fold of UCF101 and HMDB51, which have three folds of train and test, and no validation.

    None is train and val of fold 1, `2` or `split2` both of fold 2, `train3` train of fold 3. `test` is called val, as
    everywhere in this package where heads are evaluated on it.

    Raises: UsageError for any other name.
    """
    match = _NUMBERED.fullmatch("1" if split is None else split.strip().lower())
    name, fold = (match["name"], match["fold"]) if match else ("", None)
    if name in ("", "split") and fold is not None:
        return ("train", "val"), int(fold)
    if name not in SPLIT_NAMES:
        raise UsageError(
            f"--split {split!r} is unknown; expected train or val, with the fold 1 to 3 after it (train2), "
            "or a fold alone"
        )
    return ("train" if SPLIT_NAMES[name] == "train" else "val",), int(fold or 1)


def select(clips: Sequence[Clip], wanted: Iterable[str], *, source: str) -> list[int]:
    """Return the rows of the clips that `wanted` names by id or path, in its order.

    A path whose clips are all segments names all of them, in the list's order.

    Raises: UsageError for a name that no clip has, or where no clip is named.
    """
    names = list(wanted)
    # What is named, and not all there is: a list of a million clips is looked through once, and not kept.
    asked, by_path, by_id = set(names), dict[str, int](), dict[str, int]()
    segments: dict[str, list[int]] = {}
    for row, clip in enumerate(clips):
        if clip.path in asked:
            if clip.segment is None:
                by_path[clip.path] = row
            else:
                segments.setdefault(clip.path, []).append(row)
        if clip.id in asked:
            by_id[clip.id] = row
    rows = by_path | by_id
    out: list[int] = []
    for name in names:
        if name in rows:
            out.append(rows[name])
        elif name in segments:
            out.extend(segments[name])
        else:
            raise UsageError(
                f"{source}: {name!r} is no clip of the cache; expected ids or paths as `clips.jsonl` has them"
            )
    if not out:
        raise UsageError(f"{source}: names no clip; expected one id or path a line")
    return out
