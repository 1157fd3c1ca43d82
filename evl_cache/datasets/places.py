"""Find annotation files, folders and videos under a data set's root, listing each folder once."""

import os
from collections.abc import Iterable, KeysView, Mapping, Sequence
from pathlib import Path, PurePosixPath

from evl_cache.errors import UsageError

VIDEO_SUFFIXES = frozenset((
    ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv", ".3gp", ".mts",
))  # fmt: skip
_TABLE_SUFFIXES = frozenset((".csv", ".gz", ".json", ".jsonl", ".pkl", ".tsv", ".txt", ".xlsx", ".zip"))
_MOST_ENDINGS = 5  # named in a message


def require_root(root: Path, *, dataset: str) -> None:
    """Check that the root is a folder. Raises: UsageError where it is not."""
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder; expected the folder of {dataset}; "
            "give it as --root (--explain says more)"
        )


def find_annotation(directories: Sequence[Path], names: Sequence[str], *, what: str) -> Path:
    """Return the annotation file with one of the usual names, from the first directory that has one.

    Raises: UsageError where there is none, or several in one directory.
    """
    found = find_annotation_if_any(directories, names, what=what)
    if found is None:
        places = " or ".join(str(directory) for directory in directories)
        beside = [path for directory in directories for path in files_like(directory, names)]
        told = f" ({beside[0]} is there, and is not read as one)" if beside else ""
        lists = "; lists of lines 'path label' are read by --dataset list" if ".txt" in told else ""
        raise UsageError(
            f"no {what} in {places}{told}; expected {' or '.join(names[:4])}; "
            f"say where with --annotations (--explain says more){lists}"
        )
    return found


def files_like(directory: Path, names: Sequence[str]) -> list[Path]:
    """Return the tables and lists in a directory whose names begin like one of `names` without its ending, capitals apart."""
    stems = tuple(name.rpartition(".")[0].lower() for name in names)
    like = [entry for entry in list_directory(directory) if entry.name.lower().startswith(stems)]
    return sorted(directory / e.name for e in like if suffix_of(e.name) in _TABLE_SUFFIXES and is_file(e))


def find_annotation_if_any(directories: Sequence[Path], names: Sequence[str], *, what: str) -> Path | None:
    """Return what `find_annotation` does, or None where there is no such file."""
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
    """Return the folders to look in: the given one alone, or the usual ones under the root and the root.

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
    """The videos under a root by folder. Each folder is listed once, when it is first asked for.

    240,000 clips are so found with one listing for each folder instead of a request for each file. On a network disk
    that takes seconds instead of many minutes.

    Args:
        root: folder of the data set.
        suffix: the published one; it is preferred where a video is there in two formats.
    """

    def __init__(self, root: Path, *, suffix: str) -> None:
        self._root = root
        self._suffix = suffix
        self._listed: dict[str, tuple[dict[str, str], KeysView[str]]] = {}
        self._folded: dict[str, dict[str, list[str]]] = {}

    def videos(self, folder: str) -> Mapping[str, str]:
        """Return the file names of the videos in a folder (`""` is the root), by their names without ending."""
        return self._list(folder)[0]

    def folders(self, folder: str) -> KeysView[str]:
        """Return the sorted names of the folders in a folder, without hidden ones; to look for one takes no longer for many."""
        return self._list(folder)[1]

    def find(self, folders: Iterable[str], name: str) -> str | None:
        """Return the path, relative to the root, of a video by its name without ending; None where no folder has it."""
        for folder in folders:
            if name in self.videos(folder):
                return join(folder, self.videos(folder)[name])
        return None

    def folders_like(self, folder: str, name: str) -> list[str]:
        """Return the folders in a folder that have a name, capitals apart; the one that has it exactly comes first."""
        like = [found for found in self.folders(folder) if found.lower() == name.lower()]
        return sorted(like, key=lambda found: found != name)

    def video_like(self, folder: str, name: str) -> str | None:
        """Return the file name of the only video in a folder that has a name without ending, capitals apart, or None."""
        if folder not in self._folded:
            self._folded[folder] = {}
            for stem, file_name in self.videos(folder).items():
                self._folded[folder].setdefault(stem.lower(), []).append(file_name)
        like = self._folded[folder].get(name.lower(), [])
        return like[0] if len(like) == 1 else None

    def _list(self, folder: str) -> tuple[dict[str, str], KeysView[str]]:
        if folder not in self._listed:
            self._listed[folder] = self._scan(self._root / folder)
        return self._listed[folder]

    def _scan(self, directory: Path) -> tuple[dict[str, str], KeysView[str]]:
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
        return videos, dict.fromkeys(sorted(folders)).keys()

    def _better(self, known: str | None, other: str) -> str:
        if known is None:
            return other
        return min(known, other, key=lambda name: (not name.endswith(self._suffix), name))


def find_in_class_folder(tree: VideoTree, bases: Sequence[str], class_name: str, file_name: str) -> str:
    """Return the path, relative to the root, of `<base>/<class>/<file>`, with any ending of a video.

    Where no name is exactly so, the one is taken that is so but for capitals: UCF101's lists have HandstandPushups, its
    archive HandStandPushups. For a missing video it is the path under the first of `bases` that exists, or else under
    the root.
    """
    stem = PurePosixPath(file_name).stem
    present = [base for base in bases if not base or base in tree.folders("")]
    found = tree.find((join(base, class_name) for base in present), stem)
    return (
        found
        or _find_in_capitals(tree, bases, class_name, stem)
        or join(present[0] if present else "", class_name, file_name)
    )


def _find_in_capitals(tree: VideoTree, bases: Sequence[str], class_name: str, stem: str) -> str | None:
    present = [like for base in bases for like in (tree.folders_like("", base) if base else [""])]
    for base in present:
        for folder in tree.folders_like(base, class_name):
            if (video := tree.video_like(join(base, folder), stem)) is not None:
                return join(base, folder, video)
    return None


def list_directory(directory: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a directory, or none where there is no such directory.

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


def suffix_of(name: str) -> str:
    """Return the ending of a file's name in small letters, with its dot; empty where it has none, as of `.hidden`."""
    at = name.rfind(".")
    return name[at:].lower() if 0 < at < len(name) - 1 else ""


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name, and not hidden."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def is_passed_over(path: Path) -> bool:
    """Whether a path is a file that is not hidden and is no video by its name: a picture, an archive, a note."""
    return path.suffix.lower() not in VIDEO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """Return numbers of files by their endings as words: `3 files (2 .gif, 1 .txt)`; the commonest endings first."""
    total = sum(counts.values())
    commonest = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
    named = [f"{counts[suffix]} {suffix or 'without an ending'}" for suffix in commonest[:_MOST_ENDINGS]]
    more = ", …" if len(commonest) > _MOST_ENDINGS else ""
    return f"{total} {'file' if total == 1 else 'files'} ({', '.join(named)}{more})"


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry, or the target of a link, is a directory; a circular link is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry, or the target of a link, is a file; a dangling link is not."""
    try:
        return entry.is_file()
    except OSError:
        return False


def join(*parts: str) -> str:
    """Return a path relative to the root, with slashes; empty parts are left out."""
    return "/".join(part for part in parts if part)
