"""A folder of classes read the obvious way: paths by `rglob`, each asked what it is."""

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

ENDINGS = ".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv .3gp .mts".split()
FILES = ("a.mp4", "b.MP4", "c.gif", "d", "e.", ".h.mp4", "..mp4", "f.txt", "z z.avi", "a-b.webm", "a.b.mkv")
SPLITS = {
    **dict.fromkeys(("train", "training", "train_set", "videos_train", "train_256"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "eval", "val-set"), "val"),
    **dict.fromkeys(("test", "testing", "test_set"), "test"),
}


def split_of(folder: Path) -> str | None:
    return SPLITS.get(folder.name.lower())


def is_video(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.name[0] != "." and not path.is_dir()


def is_other(path: Path) -> bool:
    return path.suffix.lower() not in ENDINGS and path.name[0] != "." and path.is_file()


def has_videos(folder: Path) -> bool:
    return any(map(is_video, folder.rglob("*")))


def direct_videos(folder: Path) -> bool:
    return any(map(is_video, folder.iterdir()))


def classes_in(folder: Path) -> list[Path]:
    return [d for d in folder.iterdir() if d.is_dir() and has_videos(d)]


def is_misread(part: Path, is_split: bool) -> bool:
    """Whether classes of a part hold splits, or are called so themselves."""
    classes = classes_in(part)
    if is_split and all(split_of(d) and not direct_videos(d) for d in classes):
        return True
    for folder in (below for d in classes for below in (d, *d.rglob("*")) if below.is_dir()):
        if folder.is_symlink() and folder not in classes:
            continue
        inside = [d for d in folder.iterdir() if d.is_dir() and not d.is_symlink() and has_videos(d)]
        named = [d for d in inside if split_of(d)]
        is_all = len(classes) == 1 and len(inside) == len(named) > 0 and not direct_videos(folder)
        if len({split_of(d) for d in named}) > 1 or is_all:
            return True
    return False


def find_parts(root: Path) -> dict[str, Path] | None:
    """The folders of splits, or the root as `all`; None where two folders are one split, or one may be a class."""
    folders = [d for d in sorted(root.iterdir()) if d.is_dir() and d.name[0] != "."]
    called = [d for d in folders if split_of(d)]
    others = [d for d in folders if not split_of(d) and has_videos(d)]
    if others and not any(map(classes_in, called)):  # empty ones hide no classes
        called = [d for d in called if direct_videos(d)]
    if len({split_of(d) for d in called}) == 1 and len(folders) > 1:
        if any(map(direct_videos, called)) or (others and not any(map(classes_in, called))):
            called = []
        elif others:
            return None
    parts: dict[str, Path] = {}
    for split in {str(split_of(d)) for d in called}:
        alike = [d for d in called if split_of(d) == split]
        filled = [d for d in alike if classes_in(d)] or alike
        if len(filled) > 1:
            return None
        parts[split] = filled[0]
    return parts or {"all": root}


def slow_walk(root: Path) -> dict[str, Any] | None:
    """Paths with labels, classes, and numbers of other files, by split; None where the tree is refused."""
    parts = find_parts(root)
    if parts is None:
        return None
    if len(parts) > 1 and "test" in parts and not classes_in(parts["test"]):
        del parts["test"]
    if not all(map(classes_in, parts.values())):
        return None
    if any(is_misread(part, split != "all") for split, part in parts.items()):
        return None
    return read_parts(root, parts)


def read_parts(root: Path, parts: dict[str, Path]) -> dict[str, Any]:
    """Paths with labels, classes, and numbers of other files, by split, of the folders that are known to be the splits."""
    classes = sorted({d.name for part in parts.values() for d in classes_in(part)})
    found = {}
    for split, part in parts.items():
        below = {
            d.name: sorted(d.rglob("*"))
            for d in part.iterdir()
            if d.is_dir() and (d.name in classes or d.name[0] != ".")
        }
        others = [path for paths in below.values() for path in paths if is_other(path)]
        videos = [
            (path.relative_to(root).as_posix(), label)
            for label, name in enumerate(classes)
            for path in below.get(name, ())
            if is_video(path)
        ]
        found[split] = (videos, tuple(classes), dict(Counter(path.suffix.lower() for path in others)))
    return found


def scatter_files(places: list[Path], draw: random.Random) -> None:
    """Put files of any kind into folders: videos and others, links to what is there and what is not, pipes."""
    for _ in range(draw.randint(3, 15)):
        file, kind = draw.choice(places) / draw.choice(FILES), draw.random()
        if os.path.lexists(file):
            continue
        if kind < 0.8:
            file.touch()
        elif kind < 0.95:
            file.symlink_to(draw.choice((draw.choice(places), Path("nowhere"), Path(file.name))))
        else:
            os.mkfifo(file)
