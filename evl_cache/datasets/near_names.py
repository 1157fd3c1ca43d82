"""Why files that are there are not found: one of them beside the name expected, and what differs."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from evl_cache.datasets.places import VIDEO_SUFFIXES, is_directory, join, list_directory, suffix_of
from evl_cache.errors import UsageError

_LOOKED_AT = 20  # missing names that are compared with what is there
_MOST_ENTRIES = 200_000  # of the disk; a refusal should not take minutes
_LEAST_PREFIX = 6  # letters that a name and a shorter one must share: fewer are chance
# As the data sets of Kinetics name clips; other names may end in numbers that are no times.
_TIMED = re.compile(r"[\w-]{11}(_\d{6}){2}", re.ASCII)
_ARCHIVE = re.compile(r".*(\.(zip|tar|tgz|rar|7z|z\d\d|(tar|zip)\.\w+)|-v2-\d\d)", re.IGNORECASE)
_MORE_SUFFIXES = frozenset((
    ".3g2", ".asf", ".divx", ".f4v", ".gif", ".m2ts", ".m2v", ".mxf", ".ogg", ".qt", ".rm", ".rmvb", ".vob", ".y4m",
))  # fmt: skip
_SUFFIXES = VIDEO_SUFFIXES | _MORE_SUFFIXES  # those of data sets, and others that a video may have


@dataclass(kw_only=True)
class FilesThere:
    """The files under a root, by path relative to it.

    Attributes:
        videos: files with an ending that a video may have, also one that data sets pass over.
        archives: files that may hold videos.
        is_whole: whether all were listed.
    """

    videos: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    is_whole: bool = True


@dataclass(frozen=True, kw_only=True)
class _Near:
    """A file that may be the one expected: where it is, and why it was not found."""

    expected: str
    there: str
    cause: str


def files_there(root: Path) -> FilesThere:
    """Return the files under a root; links to folders are followed once. Folders that cannot be listed are left out."""
    out, seen, left = FilesThere(), {os.path.realpath(root)}, [""]
    entries = 0
    while left:
        folder = left.pop()
        try:
            found = list_directory(root / folder)
        except UsageError:  # what is missing is told all the same: one such as lost+found has none of it
            out.is_whole = False
            continue
        for entry in sorted(found, key=lambda entry: entry.name):
            entries += 1
            path = join(folder, entry.name)
            if entries > _MOST_ENTRIES:
                out.is_whole = False
                return out
            if is_directory(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else ""
                if not real or real not in seen:
                    seen.add(real)
                    left.append(path)
            elif entry.name.startswith("."):
                continue
            elif suffix_of(entry.name) in _SUFFIXES:
                out.videos.append(path)
            elif _ARCHIVE.fullmatch(entry.name):
                out.archives.append(path)
    return out


def likeliest_cause(
    missing: Sequence[str], root: Path, *, there: FilesThere, wanted: Callable[[str], bool]
) -> str | None:
    """Return as words a file that is there beside a missing one, and why it is not found; None where none is like it.

    Args:
        missing: paths of clips as they are expected.
        root: what they are relative to.
        there: the files under it.
        wanted: whether a path is another clip's, and so is not the file of a missing one.
    """
    sample = missing[:: max(1, len(missing) // _LOOKED_AT)][:_LOOKED_AT]
    names = _Names([path for path in there.videos if not wanted(path)])
    near = [found for path in sample if (found := _near(path, root, names, wanted)) is not None]
    if not near:
        return None
    cause, number = Counter(found.cause for found in near).most_common(1)[0]
    shown = next(found for found in near if found.cause == cause)
    share = "" if number == len(sample) else f" (and so for {number} of {len(sample)} names looked at)"
    return f"{shown.expected} is not there, but {shown.there} is{share}: {cause}"


def _near(path: str, root: Path, names: "_Names", wanted: Callable[[str], bool]) -> _Near | None:
    written = _as_written(path, root) or _in_other_folder(path, root, wanted)
    if written is not None:
        return _Near(expected=path, there=written[0], cause=written[1])
    relative = _relative(path, root)
    for cause, key in _KEYS:
        if (there := names.only(key, relative)) is not None:
            return _Near(expected=path, there=there, cause=_cause_of(cause, relative, there, root))
    before_comma, comma, _ = relative.partition(",")
    for key in (_small_without_ending, _base_without_ending) if comma else ():
        if (there := names.only(key, before_comma)) is not None:
            return _Near(expected=path, there=there, cause=_COMMA)
    if (there := names.longer_or_shorter(relative)) is not None:
        more = _loose(relative).removeprefix(_loose(there))
        is_timed = _TIMED.fullmatch(_no_ending(_base(relative))) and re.fullmatch(r"(_\d{6}){1,2}", more)
        cause = _NO_TIMES if is_timed else _PART
        return _Near(expected=path, there=there, cause=cause)
    return None


def _relative(path: str, root: Path) -> str:
    prefix = f"{root}/"
    return os.path.normpath(path.removeprefix(prefix)).replace(os.sep, "/")


def _as_written(path: str, root: Path) -> tuple[str, str] | None:
    """Return the file and the cause where a name is right but for how it is written."""
    bare = path.strip("\"'")
    tries = (
        (bare, "its quotes are read as letters of the name: leave them out"),
        (bare.replace("\\", "/"), "folders are separated by / and not by \\: write / in the names"),
        (unquote(bare), "%20 and the like are not read as the letters they stand for: write these"),
    )
    for name, cause in tries:
        if name not in ("", path) and os.path.isfile(root / name):
            return name, cause
    return None


def _in_other_folder(path: str, root: Path, wanted: Callable[[str], bool]) -> tuple[str, str] | None:
    """Return the file and the cause where a name begins with folders that are not below the root."""
    parts = PurePosixPath(path.strip("\"'").replace("\\", "/")).parts
    for number in range(1, len(parts)):
        there, more = join(*parts[number:]), os.path.join(*parts[:number])
        if os.path.isfile(root / there) and not wanted(there):
            above = root.absolute().parent
            beside = f", or name {above} as the root" if os.path.isfile(above / path) else ""
            kind = (
                "absolute names are not those under the root"
                if more.startswith("/")
                else "names begin elsewhere"
            )
            return there, f"{kind}: leave out {more.rstrip('/')}/ in them{beside}"
    return None


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _small(path: str) -> str:
    return _composed(path).casefold()


def _no_ending(path: str) -> str:
    head, _, name = path.rpartition("/")
    return join(
        head,
        name.removesuffix(name[-len(suffix) :]) if (suffix := suffix_of(name)) in _SUFFIXES else name,
    )


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _small_without_ending(path: str) -> str:
    return _small(_no_ending(path))


def _base_without_ending(path: str) -> str:
    return _small_without_ending(_base(path))


def _loose(path: str) -> str:
    return re.sub(r"[\W_]+", "_", _base_without_ending(path))


_COMPOSED = "its letters are composed otherwise (Unicode NFC and NFD): write the names as the files have them"
_CAPITALS = "capitals differ: write the names as the files have them, or rename the files"
_ENDING = "the ending differs: write the names as the files have them"
_FOLDER = "it lies in another folder: write the names as the files lie, or move the files"
_FOLDER_AND_ENDING = (
    "it lies in another folder, and its ending differs: write the names as the files lie and have them"
)
_NO_TIMES = "its name has no times, and may be of another clip of that video: name the file as expected"
_COMMA = "a comma is read as part of the name: write path<TAB>label in the list"
_PART = "a part of its name differs: write the names as the files have them, or rename the files"
_LETTERS = "spaces, dashes or other marks differ: write the names as the files have them, or rename the files"
# From the nearest on; what is unlike by two things has the cause of the later.
_KEYS: tuple[tuple[str, Callable[[str], str]], ...] = (
    (_COMPOSED, _composed),
    (_CAPITALS, _small),
    (_ENDING, _small_without_ending),
    (_FOLDER, lambda path: _small(_base(path))),
    (_FOLDER_AND_ENDING, _base_without_ending),
    (_LETTERS, _loose),
)


def _cause_of(cause: str, expected: str, there: str, root: Path) -> str:
    if cause == _ENDING and suffix_of(expected) not in _SUFFIXES:
        return "the names lack their endings: write the names as the files have them"
    if cause == _FOLDER and there.endswith(f"/{expected}"):
        folder = there.removesuffix(f"/{expected}")
        return f"names begin in {folder}/: put it before them, move the files up, or name {root / folder} as the root"
    return cause


class _Names:
    """Files that are there, found by what their names have in common with others."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._by_key: dict[Callable[[str], str], dict[str, list[str]]] = {}

    def only(self, key: Callable[[str], str], path: str) -> str | None:
        """Return the only file whose name has the same key as a path; None for none or several."""
        if key not in self._by_key:
            by_key: dict[str, list[str]] = {}
            for there in self._paths:
                by_key.setdefault(key(there), []).append(there)
            self._by_key[key] = by_key
        like = self._by_key[key].get(key(path), [])
        return like[0] if len(like) == 1 and key(path) else None

    def longer_or_shorter(self, path: str) -> str | None:
        """Return the file whose name is the longest beginning of a path's, or begins with it; None without one."""
        wanted = _loose(path)
        like = [
            (min(len(wanted), len(name)), there)
            for name, there in self._loose_names()
            if wanted.startswith(f"{name}_") or name.startswith(f"{wanted}_")
        ]
        length, there = max(like, default=(0, ""))
        return there if length >= _LEAST_PREFIX else None

    def _loose_names(self) -> Iterator[tuple[str, str]]:
        self.only(_loose, "")
        return ((name, paths[0]) for name, paths in self._by_key[_loose].items())
