"""Which folders under a root are splits, and which trees would be misread: those are refused."""

import re
from collections.abc import Mapping
from pathlib import Path

from evl_cache.clips import SPLIT_NAMES
from evl_cache.datasets.folder_tree import FolderTree
from evl_cache.errors import UsageError

_SPLITS = {
    **SPLIT_NAMES,
    "dev": "val",
    "development": "val",
    "eval": "val",
    "evaluation": "val",
    "testing": "test",
}
# Three digits are a size, as of train_256; fewer count, as of classes test1 to test12.
_NAME = re.compile(
    rf"(?:(?:videos?|clips?)[ _-]*)?(?P<split>{'|'.join(_SPLITS)})"
    r"[ _-]*(?:set|split|data|videos?|clips?|[1-9]\d{2,3}p?)?"
)
_COUNTED = re.compile(rf"(?P<split>{'|'.join(_SPLITS)})[ _-]*\d{{1,2}}")
_REMEDY = "--dataset list takes labels from a file"


def split_named(folder: str) -> str | None:
    """Return `train`, `val` or `test` for a folder's name such as `Train`, `dev` or `test_set`; None for another."""
    match = _NAME.fullmatch(folder.strip().lower())
    return _SPLITS[match["split"]] if match else None


def find_splits(root: Path, tree: FolderTree) -> dict[str, str]:
    """Return the names of the folders of splits by split, in the order of their names; empty where the root has none.

    Folders that hold no video, such as one of annotations, do not count, nor do empty ones called like splits beside
    folders of videos. A single folder called like a split is a class where videos lie in it beside other classes.

    Raises: UsageError where two folders are one split, or a folder is a split as well as a class.
    """
    visible = {name: folder for name, folder in tree.classes().items() if not name.startswith(".")}
    called = {name: split for name in visible if (split := split_named(name)) is not None}
    others = [name for name in visible if name not in called and visible[name].has_videos()]
    if others and not any(_holds_classes(visible[name]) for name in called):
        called = {name: split for name, split in called.items() if visible[name].videos}
    if not called:
        _refuse_counted(others, visible, root)
        return {}
    named: dict[str, list[str]] = {}
    for name, split in called.items():
        named.setdefault(split, []).append(name)
    taken = {*called}
    if len(named) == 1 and len(visible) > 1 and not _is_split_beside(visible, taken, others, root):
        return {}
    return {split: _only(names, visible, split, root) for split, names in named.items()}


def _refuse_counted(names: list[str], visible: Mapping[str, FolderTree], root: Path) -> None:
    """Raise UsageError where folders of classes are train1/ and val1/: as classes they would be misread."""
    counted = {name: _SPLITS[m["split"]] for name in names if (m := _COUNTED.fullmatch(name.strip().lower()))}
    if len({*counted.values()}) > 1 and all(_holds_classes(visible[name]) for name in counted):
        raise UsageError(
            f"{root}: {' and '.join(f'{name}/' for name in list(counted)[:3])} are called like splits, but for their "
            f"numbers; expected train/, val/ and test/: rename those you mean, and move others elsewhere ({_REMEDY})"
        )


def _is_split_beside(
    visible: Mapping[str, FolderTree], taken: set[str], others: list[str], root: Path
) -> bool:
    """Whether the only folders that are called like a split are one, and no class beside `others`."""
    if any(visible[name].videos for name in taken):
        return False
    if not others:
        return True
    if not any(_holds_classes(visible[name]) for name in taken):
        return False
    inside = {tuple(visible[name].classes()) for name in (*taken, *others)}
    if len(others) > 1 and len(inside) == 1 and len(*inside) == 1:
        return False  # as bus/s1/, car/s1/ and train/s1/: a split of one class is nobody's
    name, other = min(taken), others[0]
    raise UsageError(
        f"{root}: {name}/ holds folders of videos like a split, but {other}/ beside it is no split; expected train/, val/ "
        f"and test/, or folders of classes with their videos in them: rename {other}/ or {name}/ ({_REMEDY})"
    )


def _only(names: list[str], visible: Mapping[str, FolderTree], split: str, root: Path) -> str:
    filled = [name for name in names if _holds_classes(visible[name])] or names
    if len(filled) > 1:
        raise UsageError(
            f"{root}: {' and '.join(f'{name}/' for name in filled)} are both called like the split {split}; "
            f"expected one: move the other elsewhere, or merge them ({_REMEDY})"
        )
    return filled[0]


def _holds_classes(folder: FolderTree) -> bool:
    return any(below.has_videos() for below in folder.classes().values())


def refuse_misread(part: Path, folders: Mapping[str, FolderTree], *, split: str) -> None:
    """Check that no class holds what are splits by their names: the root is a level too high, or classes come first.

    Args:
        part: the folder whose folders are taken as classes.
        folders: those that hold videos, by name.
        split: of the part; `all` where it has none.

    Raises: UsageError otherwise, with where they lie and what to give instead.
    """
    if split != "all" and folders and all(_is_split(name, folder) for name, folder in folders.items()):
        name = min(folders)
        raise UsageError(
            f"{part}: {name}/ in it is called like a split, too, and would be a class; "
            f"expected folders of classes: move what is in {name}/ up to {part} ({_REMEDY})"
        )
    found = [
        (path, splits)
        for name, folder in folders.items()
        for path, below in folder.walk(name)
        if (splits := _splits_in(below, alone=len(folders) == 1))
    ]
    if not found:
        return
    path, splits = found[0]
    names = " and ".join(f"{name}/" for name in splits)
    inside = f"{part}: {path}/ would be part of a class, but it holds {names}"
    is_root = any(_holds_classes(below) for below in splits.values())
    if is_root and len(found) == 1:
        raise UsageError(f"{inside}; expected the folder of these as --root: give --root {part / path}")
    number = f", as do {len(found)} folders in all" if len(found) > 1 else ""
    raise UsageError(
        f"{inside}{number}; expected train/<class>/<video> and val/<class>/<video>: "
        f"move them so{f', or give one folder as --root: {part / path}' if is_root else ''} ({_REMEDY})"
    )


def _is_split(name: str, folder: FolderTree) -> bool:
    return split_named(name) is not None and not folder.videos


def _splits_in(folder: FolderTree, *, alone: bool) -> dict[str, FolderTree]:
    """Return the folders in a folder that are its splits: two or more, or one where nothing else lies beside it."""
    filled = {name: below for name, below in folder.folders.items() if below.has_videos()}
    named = {name: below for name, below in filled.items() if split_named(name) is not None}
    if len({split_named(name) for name in named}) > 1:
        return named
    return named if alone and named and len(named) == len(filled) and not folder.videos else {}
