"""Read a folder of classes: `<class>/<video>`, or `<split>/<class>/<video>`."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from evl_cache.clips import SPLIT_NAMES, Clip, ClipList, normal_split
from evl_cache.datasets.places import (
    VIDEO_SUFFIXES,
    describe_passed_over,
    is_directory,
    is_file,
    list_directory,
    suffix_of,
)
from evl_cache.errors import UsageError


def read_class_folders(
    root: Path, *, dataset: str, annotations: Path | None, split: str | None
) -> dict[str, ClipList]:
    """Return the clip lists of a folder by split, or that of the one split named.

    Args:
        root: the folder.
        dataset: its name, for messages.
        annotations: what the user gave as annotations; None is expected.
        split: the split wanted. A folder that has no splits is the split that is named.

    Raises: UsageError for annotations, for a split that is not there, or where there is no folder of videos.
    """
    if annotations is not None:
        raise UsageError(
            f"--annotations {annotations} with --dataset {dataset}; the folders are the labels: leave it out"
        )
    lists = read_folder(root)
    if split is None:  # a test folder stands in for val only where there is no val
        return {name: clips for name, clips in lists.items() if name != "test" or "val" not in lists}
    wanted = normal_split(split)
    if set(lists) == {"all"}:
        clips = tuple(replace(clip, split=wanted) for clip in lists["all"].clips)
        return {wanted: replace(lists["all"], clips=clips)}
    if wanted not in lists:
        raise UsageError(
            f"{root}: no folder of split {wanted}, only {', '.join(lists)}; expected one of these as --split"
        )
    return {wanted: lists[wanted]}


def read_folder(root: Path) -> dict[str, ClipList]:
    """Return clip lists by split, one called `all` where the folder has no splits; classes are in alphabetical order.

    Hidden files, and files whose names do not end like a video's, are left out; the latter are counted in `passed_over`.

    Raises: UsageError where there is no folder of videos.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder; expected <class>/<video> or train/<class>/<video> under --root"
        )
    directories = [name for name in _folders(root) if not name.startswith(".")]
    splits = {SPLIT_NAMES[name]: root / name for name in directories if name in SPLIT_NAMES}
    divided = bool(splits) and len(splits) == len(directories)
    parts = splits if divided else {"all": root}
    found = {split: {name: _look(part / name) for name in _folders(part)} for split, part in parts.items()}
    classes = tuple(sorted({name for part in found.values() for name, look in part.items() if look.videos}))
    if not classes:
        others = _look(root).passed_over
        told = f", but {describe_passed_over(others)}" if others else ""
        raise UsageError(
            f"{root}: no video in any folder{told}; expected <class>/<video> "
            f"({', '.join(sorted(VIDEO_SUFFIXES)[:6])}, …); --dataset list takes files of any ending"
        )
    return {split: _one_split(root, part, split, classes, found[split]) for split, part in parts.items()}


@dataclass(kw_only=True)
class _Look:
    """What lies below a folder.

    Attributes:
        videos: paths relative to the folder, with slashes; those of a folder before those of the next.
        passed_over: numbers of other files by their endings, hidden ones left out.
    """

    videos: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def _one_split(
    root: Path, part: Path, split: str, classes: tuple[str, ...], found: Mapping[str, _Look]
) -> ClipList:
    clips, prefix = [], "" if part == root else f"{part.relative_to(root).as_posix()}/"
    for label, name in enumerate(classes):
        for video in found[name].videos if name in found else ():
            path = f"{prefix}{name}/{video}"
            clips.append(Clip(id=path, path=path, label=label, split=split))
    others: Counter[str] = Counter()
    for name, look in found.items():  # of a folder without any video, too: it is no class
        if name in classes or not name.startswith("."):
            others.update(look.passed_over)
    return ClipList(
        clips=tuple(clips),
        classes=classes,
        source=str(part),
        is_undivided=split == "all",
        passed_over=others,
    )


def _folders(directory: Path) -> list[str]:
    return sorted(entry.name for entry in list_directory(directory) if is_directory(entry))


def _look(folder: Path) -> _Look:
    """Return what lies below a folder.

    Each folder is listed once, and a file whose entry tells its kind is not looked at. Links to folders are not followed
    below it, and folders that may not be read are left out.
    """
    look = _Look()
    _look_into(str(folder), "", look)
    return look


def _look_into(directory: str, prefix: str, look: _Look) -> None:
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except PermissionError:
        return
    for entry in entries:
        if is_directory(entry):
            if not entry.is_symlink():
                _look_into(entry.path, f"{prefix}{entry.name}/", look)
        elif entry.name.startswith("."):
            continue
        elif (suffix := suffix_of(entry.name)) in VIDEO_SUFFIXES:
            look.videos.append(f"{prefix}{entry.name}")
        elif is_file(entry):
            look.passed_over[suffix] += 1
