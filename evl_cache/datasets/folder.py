"""Read a folder of classes: `<class>/<video>`, or `<split>/<class>/<video>`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evl_cache.clips import Clip, ClipList, normal_split
from evl_cache.datasets.folder_tree import FolderTree, read_tree
from evl_cache.datasets.places import VIDEO_SUFFIXES, describe_passed_over
from evl_cache.datasets.split_folders import find_splits, refuse_misread, split_named
from evl_cache.errors import UsageError

_SHOWN = 3  # names in a remark


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
    if split is None:  # a test folder stands in for val only where there is no val
        lists = read_folder(root)
        return {name: clips for name, clips in lists.items() if name != "test" or "val" not in lists}
    wanted = normal_split(split)
    lists = read_folder(root, split=wanted)
    if set(lists) == {"all"}:
        clips = tuple(replace(clip, split=wanted) for clip in lists["all"].clips)
        return {wanted: replace(lists["all"], clips=clips)}
    return lists


def read_folder(root: Path, *, split: str | None = None) -> dict[str, ClipList]:
    """Return clip lists by split, one called `all` where the folder has no splits; classes are in alphabetical order.

    Hidden files, and files whose names do not end like a video's, are left out; the latter are counted in `passed_over`.
    What else is no clip is told in `remarks`. A test folder without classes is left out beside other splits.

    Args:
        split: of the splits, the only one wanted. The others still number the classes.

    Raises: UsageError where there is no folder of videos, a split is not there, or the folders would be misread.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder; expected <class>/<video> or train/<class>/<video> under --root"
        )
    tree = read_tree(root, is_divided=lambda name: split_named(name) is not None)
    splits = find_splits(root, tree)
    places = {name: root / folder for name, folder in splits.items()} or {"all": root}
    parts = {name: tree.classes()[folder] for name, folder in splits.items()} or {"all": tree}
    filled = {
        name: {folder: below for folder, below in part.classes().items() if below.has_videos()}
        for name, part in parts.items()
    }
    classes = tuple(sorted({folder for folders in filled.values() for folder in folders}))
    if not classes:
        raise _no_class(root, tree, splits.values())
    wanted = _wanted(root, splits, split, filled)
    for name in wanted:
        _check_part(places[name], parts[name], filled[name])
    for name in parts:  # all of them: they number the classes
        refuse_misread(places[name], filled[name], split=name)
    beside = _beside(tree, splits, set(parts) - set(wanted), parts) if splits else []
    lists = {name: _one_split(root, places[name], name, classes, parts[name]) for name in wanted}
    first = next(iter(lists))
    return lists | {first: replace(lists[first], remarks=(*beside, *lists[first].remarks))}


def _no_class(root: Path, tree: FolderTree, splits: Iterable[str]) -> UsageError:
    loose = [f"{name}/" for name in splits if tree.classes()[name].videos]
    if loose or tree.videos:
        where = f"{' and '.join(loose)} of it" if loose else "it"
        return UsageError(
            f"{root}: no video in any folder of a class; videos lie in {where} directly, and have no label; expected "
            "<class>/<video> or train/<class>/<video>: --dataset list takes labels from a file"
        )
    others = tree.all_others() + sum((below.all_others() for below in tree.linked.values()), Counter())
    told = f", but {describe_passed_over(others)}" if others else ""
    return UsageError(
        f"{root}: no video in any folder{told}; expected <class>/<video> "
        f"({', '.join(sorted(VIDEO_SUFFIXES)[:6])}, …); --dataset list takes files of any ending"
    )


def _wanted(
    root: Path, splits: Mapping[str, str], split: str | None, filled: Mapping[str, Mapping[str, FolderTree]]
) -> list[str]:
    """Return the splits to read: the one named, or all but a test folder that has no classes."""
    if not splits:
        return ["all"]
    if split is None:
        return [name for name in splits if name != "test" or filled[name]]
    if split not in splits:
        raise UsageError(
            f"{root}: no folder of split {split}, only {', '.join(splits)}; expected one of these as --split"
        )
    return [split]


def _check_part(part: Path, tree: FolderTree, filled: Mapping[str, FolderTree]) -> None:
    if tree.is_unreadable:
        raise UsageError(f"{part}: cannot be listed (permission denied); expected a folder you may read")
    if not filled:
        found = f"{_number(len(tree.videos), 'video')} in it directly" if tree.videos else "no video"
        raise UsageError(
            f"{part}: {found}, and none in a folder of a class; expected {part.name}/<class>/<video>: "
            "name another split with --split, or list the videos with their labels (--dataset list)"
        )


def _one_split(root: Path, part: Path, split: str, classes: tuple[str, ...], tree: FolderTree) -> ClipList:
    folders = tree.classes()
    clips, prefix = [], "" if part == root else f"{part.relative_to(root).as_posix()}/"
    for label, name in enumerate(classes):
        paths = folders[name].all_videos(f"{prefix}{name}/") if name in folders else ()
        clips += [Clip(id=path, path=path, label=label, split=split) for path in paths]
    others: Counter[str] = Counter()
    for name, folder in folders.items():  # of a folder without any video, too: it is no class
        if name in classes or not name.startswith("."):
            others.update(folder.all_others())
    return ClipList(
        clips=tuple(clips),
        classes=classes,
        source=str(part),
        is_undivided=split == "all",
        passed_over=others,
        remarks=tuple(_remarks(tree, classes, split)),
    )


def _remarks(tree: FolderTree, classes: Sequence[str], split: str) -> list[str]:
    """Return what a person should know of a part before it is read: what lies in it and becomes no clip."""
    folders = {name: folder for name, folder in tree.classes().items() if not name.startswith(".")}
    filled = {name: folder for name, folder in folders.items() if name in classes}
    below = [pair for name, folder in filled.items() for pair in folder.walk(name)]
    empty = [name for name in folders if name not in classes]
    there = tree.classes()
    absent = [name for name in classes if name not in there or not there[name].has_videos()]
    links = [f"{path}/{name}" for path, folder in below for name in [*folder.links, *folder.linked]]
    hidden = [name for name in there if name.startswith(".") and name in classes]
    closed = [path for path, folder in folders.items() if folder.is_unreadable]
    closed += [path for path, folder in below if folder.is_unreadable]
    told = [
        (empty, "folders without a video are no classes, and take no number: {}"),
        (hidden, "folders whose names begin with a dot are classes, too: {}"),
        (absent, f"classes without a video in {split}: {{}}"),
        (tree.videos, "videos outside folders of classes are passed over: {}"),
        (links, "links to folders inside a class are not followed: {}"),
        (closed, "folders that may not be read are passed over: {}"),
    ]
    remarks = [text.format(_names(names)) for names, text in told if names]
    only = filled.get(classes[0]) if len(classes) == 1 else None
    if only is not None and not only.videos and len(only.folders) > 1:
        names = _names([f"{name}/" for name in only.folders])
        remarks.append(f"all videos have the one class {classes[0]!r}, whose folders {names} are no classes")
    return remarks


def _beside(
    tree: FolderTree, splits: Mapping[str, str], unwanted: set[str], parts: Mapping[str, FolderTree]
) -> list[str]:
    """Return what lies beside the splits that are read, and holds videos."""
    others = [
        f"{name}/"
        for name, folder in tree.classes().items()
        if name not in splits.values() and not name.startswith(".") and folder.has_videos()
    ]
    flat = [f"{splits[name]}/" for name in unwanted if name == "test" and parts[name].videos]
    told = [
        (others, "folders of videos beside the splits are passed over: {}"),
        (flat, "videos outside folders of classes are passed over: {}"),
        (tree.videos, "videos beside the splits are passed over: {}"),
    ]
    return [text.format(_names(names)) for names, text in told if names]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
