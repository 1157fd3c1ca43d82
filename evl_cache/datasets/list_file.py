"""Read a list file or a table: a path and a label a line, and what more a table's columns say."""

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from evl_cache.clips import Clip, ClipList, is_negative, number_labels
from evl_cache.datasets.class_file import number_by_names, read_class_names
from evl_cache.datasets.list_lines import LIST_FORMS, ListLine, parse_list, refuse_several_labels
from evl_cache.datasets.missing import FRAMES_REMEDY
from evl_cache.datasets.places import VIDEO_SUFFIXES, suffix_of
from evl_cache.datasets.table_rows import read_table
from evl_cache.errors import UsageError
from evl_cache.notation import counted

_OFTEN_NONE = frozenset({"nan", "na", "n/a", "none", "null", "unknown", "?"})
_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte that is not UTF-8


def read_lists(path: Path, *, split: str | None, classes_path: Path | None = None) -> dict[str, ClipList]:
    """Return the clips of a list or table by split. Paths stay as written: `--root` says what they are relative to.

    mmaction2's lists of videos are read. Its lists of frame folders (`folder total_frames label`) do not name videos, and
    are an error. All splits of one table number their classes alike.

    Args:
        split: the one wanted, or that of a file without a column of splits; None is `all` of such a file, and train and
            val (test where there is no val) of a table.
        classes_path: a file that names the classes in their order.

    Raises: UsageError where a file cannot be read, or with the line of whatever is wrong in it.
    """
    text, source = _text(path), str(path)
    table = read_table(path, text)
    rows, remarks = (parse_list(text, source=source), []) if table is None else table
    if table is None:
        _refuse_frame_folders(rows, source=source)
        _refuse_unknown_header(rows, source=source)
    read = rows
    rows = _labelled(read, split, source, only_wanted=classes_path is not None)
    remarks += _remarks_of_labels(rows, read)
    lines, names = [row.line for row in rows], [row.label for row in rows]
    if classes_path is None:
        refuse_several_labels(rows, source=source)
        labels, classes = number_labels(names, source=source, lines=lines)
    else:
        classes = read_class_names(classes_path)
        labels = number_by_names(names, classes, path=classes_path, source=source, lines=lines)
        if empty := len(classes) - len({*labels}):
            remarks.append(f"{empty} of {len(classes)} classes of {classes_path} have no clip")
    clips = tuple(
        Clip(
            id=r.id or r.path,
            path=r.path,
            label=label,
            split=r.split or split or "all",
            line=r.line,
            segment=r.segment,
        )
        for r, label in zip(rows, labels, strict=True)
    )
    has_splits = any(row.split is not None for row in rows)
    _refuse_same_parts(rows, has_splits=has_splits, source=source)
    _refuse_same_ids(rows, source=source)
    # Also of all splits together: no clip is in two of them.
    listed = ClipList(
        clips=clips, classes=classes, source=source, is_undivided=not has_splits, remarks=tuple(remarks)
    )
    return _by_split(listed, split) if has_splits else {split or "all": listed}


def _labelled(
    rows: Sequence[ListLine], split: str | None, source: str, *, only_wanted: bool
) -> list[ListLine]:
    """Return the rows without those of splits that are not read and have no label, as test sets often have none.

    Args:
        only_wanted: whether other clips of splits that are not read are left out, too: they number no class.

    Raises: UsageError for another row without a label, or with one that is not UTF-8, or for one without a split.
    """
    there = {row.split for row in rows}
    kept = list(rows) if there <= {None} else _kept(rows, split, source, only_wanted=only_wanted)
    for row in kept:
        if not row.label:
            raise UsageError(
                f"{source}, line {row.line}: no label; expected a path and one label for each clip"
            )
        if not row.label.isascii() and _SURROGATE.search(row.label):
            raise UsageError(
                f"{source}, line {row.line}: label {row.label!r} is not UTF-8; save the list as UTF-8"
            )
    return kept


def _kept(rows: Sequence[ListLine], split: str | None, source: str, *, only_wanted: bool) -> list[ListLine]:
    """Return the rows that `_labelled` keeps, whatever their labels. Raises: UsageError for one without a split."""
    for row in rows:
        if row.split is None:
            raise UsageError(
                f"{source}, line {row.line}: no split, as other lines have; expected train, val or test"
            )
    has_label = [bool(row.label) and not is_negative(row.label) for row in rows]
    of_labels = {row.split for row, has in zip(rows, has_label, strict=True) if has}
    there = {str(row.split) for row in rows}
    if split is None and "val" not in there and "train" in there and "test" not in of_labels:
        there.discard("test")
    wanted = _wanted(there, split)
    return [
        row
        for row, has in zip(rows, has_label, strict=True)
        if row.split in wanted or (has and not only_wanted)
    ]


def _remarks_of_labels(rows: Sequence[ListLine], read: Sequence[ListLine]) -> list[str]:
    """Return lines on clips that are left out without a word of the list, and on labels that often mean none."""
    left = Counter(row.split for row in read) - Counter(row.split for row in rows)
    odd = Counter(row.label for row in rows if row.label.lower() in _OFTEN_NONE)
    return [
        *(
            f"of split {split} {counted(n, 'clip')} left out, with no label or not asked for"
            for split, n in left.items()
        ),
        *(
            f"{label!r} is the class of {counted(n, 'clip')}, and often marks a clip without a label"
            for label, n in odd.items()
        ),
    ]


def _wanted(there: Collection[str], split: str | None) -> list[str]:
    """Return the splits that are read: the one named, or train and val (test where there is no val)."""
    usual = ("train", "val") if "val" in there else ("train", "test")
    return [name for name in usual if name in there] if split is None else [split]


def _by_split(listed: ClipList, split: str | None) -> dict[str, ClipList]:
    counts = Counter(clip.split for clip in listed.clips)
    wanted = _wanted(counts, split)
    if not counts[wanted[0]]:
        raise UsageError(
            f"{listed.source}: no clip of split {split}, only of {', '.join(sorted(counts))}; expected one of these as --split"
        )
    remarks = [*listed.remarks, *_in_both(listed.clips)]
    if split is None:
        remarks += [
            f"{counted(n, 'clip')} of split {name} left out: --split {name}"
            for name, n in counts.items()
            if name not in wanted
        ]
    out = {}
    for name in wanted:
        clips = tuple(clip for clip in listed.clips if clip.split == name)
        out[name] = replace(listed, clips=clips, remarks=tuple(remarks))
        remarks = []  # they are told once
    return out


def _in_both(clips: Sequence[Clip]) -> list[str]:
    """Return a line on videos of which segments are trained on and others scored; none without any."""
    sides = {name: {clip.path for clip in clips if clip.split == name} for name in ("train", "val", "test")}
    both = {name: len(sides["train"] & sides[name]) for name in ("val", "test")}
    return [f"{counted(n, 'video')} with segments in both train and {name}" for name, n in both.items() if n]


def _refuse_same_parts(rows: Sequence[ListLine], *, has_splits: bool, source: str) -> None:
    """Raise UsageError where one part of a video is two clips, under two ids: it would have two labels, or count twice."""
    if all(
        row.segment is None and row.id in ("", row.path) and os.path.normpath(row.path) == row.path
        for row in rows
    ):
        return  # ids are paths, as they stand: the list itself refuses two that are alike
    seen: dict[object, ListLine] = {}
    for row in rows:
        is_whole = row.segment is None or (row.segment.start == 0 and row.segment.end is None)
        other = seen.setdefault((os.path.normpath(row.path), None if is_whole else row.segment), row)
        if other is not row:
            name = row.id if row.id and row.id == other.id else row.path
            raise UsageError(
                f"{source}: {name!r} occurs twice (lines {other.line} and {row.line}); expected each video, or part of "
                f"it, once{', in one split' if has_splits else ''}"
            )


def _refuse_same_ids(rows: Sequence[ListLine], *, source: str) -> None:
    """Raise UsageError where a column of ids names two clips alike, as ids of videos do."""
    seen: dict[str, ListLine] = {}
    for row in rows:
        if row.id in ("", row.path):  # the list itself refuses two of those
            continue
        other = seen.setdefault(row.id, row)
        if other is not row:
            raise UsageError(
                f"{source}: two clips have the id {row.id!r} (lines {other.line} and {row.line}); expected ids that name one "
                "clip each: rename the column, or leave it out"
            )


def _refuse_unknown_header(rows: Sequence[ListLine], *, source: str) -> None:
    """Raise UsageError where the first line alone names no video by its ending: it names columns, or is a title."""
    is_video = [suffix_of(row.path) in VIDEO_SUFFIXES for row in rows]
    if len(rows) > 1 and not is_video[0] and all(is_video[1:]):
        raise UsageError(
            f"{source}, line {rows[0].line}: {rows[0].path!r} is no video by its ending, as those of all other lines are; "
            "expected columns called path and label, if it names them, or no such line"
        )


def _text(path: Path) -> str:
    try:
        # Names of files need not be UTF-8, and those in another encoding are not found on the disk.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"{path}: cannot be read as a list of clips ({reason}); expected lines {LIST_FORMS}"
        ) from error
    if "\0" in text:  # as in UTF-16
        raise UsageError(f"{path}: is no list of clips (it holds zeros); expected UTF-8 lines {LIST_FORMS}")
    return text


def _refuse_frame_folders(rows: Sequence[ListLine], *, source: str) -> None:
    """Raise UsageError where all lines name frame folders; a single such line may be a video's odd name."""
    if rows and all(_counts_frames(row.path) for row in rows):
        row = rows[0]
        raise UsageError(
            f"{source}, line {row.line}: '{row.path} {row.label}' looks like a folder of frames, their number "
            "and a label (mmaction2 rawframes); expected 'path label' with the path of a video: "
            f"list the videos instead, or {FRAMES_REMEDY}"
        )


def _counts_frames(path: str) -> bool:
    parts = path.rsplit(None, 1)
    return len(parts) == 2 and parts[1].isdecimal() and PurePath(path).suffix.lower() not in VIDEO_SUFFIXES
