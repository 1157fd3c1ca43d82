"""What lies in a folder and below it: every folder is listed once, and nothing in it is dropped unsaid."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from evl_cache.datasets.places import VIDEO_SUFFIXES, is_directory, is_file, list_directory, suffix_of
from evl_cache.errors import UsageError

_DEEPEST = 200  # folders within each other; those of people are a few
_NONE: Mapping[str, "FolderTree"] = MappingProxyType(
    {}
)  # shared: most folders of large trees hold one video alone
_NO_OTHERS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderTree:
    """A folder, and those below it.

    Attributes:
        videos: names of the videos that lie in the folder itself, sorted; hidden ones are left out.
        others: numbers of its other files by their endings; hidden ones are left out.
        folders: those in it by name, sorted.
        links: names of the links to folders in it that were not followed, sorted.
        linked: links to folders in it that were followed, as `folders`.
        is_unreadable: whether it may not be listed.
    """

    videos: Sequence[str] = ()
    others: Mapping[str, int] = field(default_factory=lambda: _NO_OTHERS)
    folders: "Mapping[str, FolderTree]" = field(default_factory=lambda: _NONE)
    links: Sequence[str] = ()
    linked: "Mapping[str, FolderTree]" = field(default_factory=lambda: _NONE)
    is_unreadable: bool = False

    def all_videos(self, prefix: str = "") -> Iterator[str]:
        """Yield the paths of all videos in the folder and below, after `prefix`; sorted by name, folder by folder."""
        for name in sorted([*self.videos, *self.folders]) if self.folders else self.videos:
            if name in self.folders:
                yield from self.folders[name].all_videos(f"{prefix}{name}/")
            else:
                yield f"{prefix}{name}"

    def has_videos(self) -> bool:
        """Whether a video lies in the folder or below."""
        return bool(self.videos) or any(folder.has_videos() for folder in self.folders.values())

    def all_others(self) -> Counter[str]:
        """Return the numbers of other files in the folder and below."""
        counts: Counter[str] = Counter()
        for _, folder in self.walk(""):
            if folder.others:
                counts.update(folder.others)
        return counts

    def walk(self, name: str) -> "Iterator[tuple[str, FolderTree]]":
        """Yield the folder, which is called `name`, and all below it with their paths."""
        yield name, self
        for below, folder in self.folders.items():
            yield from folder.walk(f"{name}/{below}")

    def classes(self) -> "dict[str, FolderTree]":
        """Return the folders in it, and those that links lead to, by name, sorted."""
        return dict(sorted({**self.folders, **self.linked}.items()))


def read_tree(root: Path, *, is_divided: Callable[[str], bool]) -> FolderTree:
    """Return what lies in a folder. Links in it are followed; links below them may lead back, and are not.

    Args:
        is_divided: tells by its name whether a folder in it may hold folders of classes; links in that are followed, too.

    Raises: UsageError where the folder itself may not be listed, or folders are very many within each other.
    """
    return _tree(list_directory(root), depth=0, is_divided=is_divided)


def _tree(
    entries: "list[os.DirEntry[str]]", *, depth: int, is_divided: Callable[[str], bool], follows: bool = True
) -> FolderTree:
    videos: list[str] = []
    links: list[str] = []
    others: Counter[str] = Counter()
    folders: dict[str, FolderTree] = {}
    linked: dict[str, FolderTree] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        if is_directory(entry):
            is_link = entry.is_symlink()
            if is_link and not follows:
                links.append(entry.name)
                continue
            below = _below(entry, depth + 1, is_divided)
            (linked if is_link else folders)[entry.name] = below
        elif entry.name.startswith("."):
            continue
        elif (suffix := suffix_of(entry.name)) in VIDEO_SUFFIXES:
            videos.append(entry.name)
        elif is_file(entry):
            others[suffix] += 1
    return FolderTree(
        videos=tuple(videos),
        others=others or _NO_OTHERS,
        folders=folders or _NONE,
        links=tuple(links),
        linked=linked or _NONE,
    )


def _below(entry: "os.DirEntry[str]", depth: int, is_divided: Callable[[str], bool]) -> FolderTree:
    if depth > _DEEPEST:
        raise UsageError(
            f"{entry.path:.200}…: folders are more than {_DEEPEST} deep; expected <class>/<video>: move the videos up"
        )
    try:
        with os.scandir(entry.path) as found:
            entries = list(found)
    except PermissionError:
        return FolderTree(is_unreadable=True)
    except OSError as error:
        raise UsageError(
            f"{entry.path}: cannot be listed ({error.strerror}); expected a folder of videos you may read"
        ) from error
    follows = depth == 1 and is_divided(entry.name)
    return _tree(entries, depth=depth, is_divided=is_divided, follows=follows)
