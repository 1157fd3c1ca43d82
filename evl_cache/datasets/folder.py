"""Read a folder of classes: `<class>/<video>`, or `<split>/<class>/<video>`."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from evl_cache.clips import SPLIT_NAMES, Clip, ClipList, normal_split
from evl_cache.datasets.places import VIDEO_SUFFIXES, describe_passed_over, is_passed_over, is_video
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
    directories = [d for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith(".")]
    splits = {SPLIT_NAMES[d.name]: d for d in directories if d.name in SPLIT_NAMES}
    divided = bool(splits) and len(splits) == len(directories)
    parts = splits if divided else {"all": root}
    classes = sorted(
        {d.name for part in parts.values() for d in part.iterdir() if d.is_dir() and _has_video(d)}
    )
    if not classes:
        others = Counter(path.suffix.lower() for path in root.rglob("*") if is_passed_over(path))
        found = f", but {describe_passed_over(others)}" if others else ""
        raise UsageError(
            f"{root}: no video in any folder{found}; expected <class>/<video> "
            f"({', '.join(sorted(VIDEO_SUFFIXES)[:6])}, …); --dataset list takes files of any ending"
        )
    return {split: _one_split(root, part, split, tuple(classes)) for split, part in parts.items()}


def _one_split(root: Path, part: Path, split: str, classes: tuple[str, ...]) -> ClipList:
    clips = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        for path in sorted((part / name).rglob("*")) if (part / name).is_dir() else []:
            if is_video(path):
                relative = path.relative_to(root).as_posix()
                clips.append(Clip(id=relative, path=relative, label=label, split=split))
            elif is_passed_over(path):
                others[path.suffix.lower()] += 1
    for folder in part.iterdir():  # of a folder without any video, too: it is no class
        if folder.name not in classes and not folder.name.startswith(".") and folder.is_dir():
            others.update(path.suffix.lower() for path in folder.rglob("*") if is_passed_over(path))
    return ClipList(
        clips=tuple(clips),
        classes=classes,
        source=str(part),
        is_undivided=split == "all",
        passed_over=others,
    )


def _has_video(directory: Path) -> bool:
    return any(is_video(path) for path in directory.rglob("*"))
