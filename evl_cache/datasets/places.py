"""Where things lie under a data set's root: annotation files, folders, videos. Folders are listed once."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from evl_cache.datasets.folder import VIDEO_SUFFIXES
from evl_cache.errors import UsageError

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
}
_NUMBERED = re.compile(r"(?P<name>[a-z]*)(?:[ _-]?0?(?P<fold>[1-3]))?")


def normal_split(split: str) -> str:
    """`train`, `val` or `test` for what publishers and users write.

    Raises: UsageError for any other name.
    """
    name = SPLIT_NAMES.get(split.strip().lower())
    if name is None:
        raise UsageError(f"--split {split!r} is unknown; expected train, val (validate, validation) or test")
    return name


def numbered_split(split: str | None) -> tuple[tuple[str, ...], int]:
    """Splits and fold of UCF101 and HMDB51, which have three folds of train and test, and no validation.

    None -> train and val of fold 1; `2` or `split2` -> both of fold 2; `train3` -> train of fold 3;
    `test` is called val, as everywhere in this package where it is what a head is judged on.

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


def require_root(root: Path, *, dataset: str) -> None:
    """Raises: UsageError where the root is no folder."""
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder; expected the folder of {dataset}; "
            "give it as --root (--explain says more)"
        )


def find_annotation(directories: Sequence[Path], names: Sequence[str], *, what: str) -> Path:
    """The annotation file of one of the usual names, in the first directory that has one.

    Raises: UsageError where there is none, or several in one directory.
    """
    found = find_annotation_if_any(directories, names, what=what)
    if found is None:
        places = " or ".join(str(directory) for directory in directories)
        raise UsageError(
            f"no {what} in {places}; expected {' or '.join(names[:4])}; "
            "say where with --annotations (--explain says more)"
        )
    return found


def find_annotation_if_any(directories: Sequence[Path], names: Sequence[str], *, what: str) -> Path | None:
    """As `find_annotation`; None where there is none."""
    for directory in directories:
        found = [directory / name for name in names if (directory / name).is_file()]
        if len(found) > 1:
            raise UsageError(
                f"{directory}: several files may be the {what}: {', '.join(path.name for path in found)}; "
                "expected one; say which with --annotations"
            )
        if found:
            return found[0]
    return None


def annotation_folders(root: Path, given: Path | None, usual: Sequence[str]) -> list[Path]:
    """Folders in which to look: the given one alone, or the usual ones under the root, and the root.

    Raises: UsageError where the given one is no folder.
    """
    if given is None:
        return [*(root / name for name in usual if (root / name).is_dir()), root]
    if not given.is_dir():
        state = "is a file" if given.exists() else "does not exist"
        raise UsageError(
            f"--annotations {given} {state}; expected the folder that holds the annotation files"
        )
    return [given]


class VideoTree:
    """Videos under a root, by folder. Each folder is listed once, when first asked for.

    A download of 240,000 clips is found with one listing a folder, not one question a file: on a network disk
    that is seconds instead of many minutes.
    """

    def __init__(self, root: Path, *, suffix: str) -> None:
        """`suffix` is the published one: it wins where a video lies there in two formats."""
        self._root = root
        self._suffix = suffix
        self._listed: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {}

    def videos(self, folder: str) -> Mapping[str, str]:
        """File name of each video directly in a folder (`""` is the root), by name without ending."""
        return self._list(folder)[0]

    def folders(self, folder: str) -> tuple[str, ...]:
        """Names of the folders in a folder, sorted; hidden ones are left out."""
        return self._list(folder)[1]

    def find(self, folders: Iterable[str], name: str) -> str | None:
        """Path, relative to the root, of a video named without its ending; None where no folder has it."""
        for folder in folders:
            if name in self.videos(folder):
                return join(folder, self.videos(folder)[name])
        return None

    def _list(self, folder: str) -> tuple[dict[str, str], tuple[str, ...]]:
        if folder not in self._listed:
            self._listed[folder] = self._scan(self._root / folder)
        return self._listed[folder]

    def _scan(self, directory: Path) -> tuple[dict[str, str], tuple[str, ...]]:
        videos: dict[str, str] = {}
        folders: list[str] = []
        for entry in list_directory(directory):
            name, suffix = os.path.splitext(entry.name)
            if entry.name.startswith("."):
                continue
            if suffix.lower() in VIDEO_SUFFIXES:
                videos[name] = self._better(videos.get(name), entry.name)
            elif is_directory(entry):
                folders.append(entry.name)
        return videos, tuple(sorted(folders))

    def _better(self, known: str | None, other: str) -> str:
        if known is None:
            return other
        return min(known, other, key=lambda name: (not name.endswith(self._suffix), name))


def find_in_class_folder(tree: VideoTree, bases: Sequence[str], class_name: str, file_name: str) -> str:
    """Path, relative to the root, of `<base>/<class>/<file>`, whatever the file's ending.

    A missing one is expected in the first of the bases that there is, and in the root where there is none.
    """
    present = [base for base in bases if not base or base in tree.folders("")]
    found = tree.find((join(base, class_name) for base in present), PurePosixPath(file_name).stem)
    return found or join(present[0] if present else "", class_name, file_name)


def list_directory(directory: Path) -> list[os.DirEntry[str]]:
    """Entries of a directory; none where there is no such directory.

    Raises: UsageError where it cannot be listed.
    """
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name no file can have
        return []
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"{directory}: cannot be listed ({reason}); expected a folder of videos you may read"
        ) from error


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry, or what a link leads to, is a directory; a link in a circle leads to none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry, or what a link leads to, is a file; a dangling link is none."""
    try:
        return entry.is_file()
    except OSError:
        return False


def join(*parts: str) -> str:
    """A path relative to the root, with slashes; empty parts are left out."""
    return "/".join(part for part in parts if part)
