"""Read the lines of a list: the path of a clip and its one label."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evl_cache.clips import Segment
from evl_cache.datasets.places import VIDEO_SUFFIXES, suffix_of
from evl_cache.errors import UsageError

LIST_FORMS = "'path label', 'path<TAB>label' or 'path,label'"
_OR_NAMED = ", or name the columns in a first line: path,label,split"
_VIDEO = "|".join(map(re.escape, sorted(VIDEO_SUFFIXES)))
# A path that ends as videos do, and what follows; else, before a comma, any path with an ending.
_AFTER_VIDEO = re.compile(rf"(?P<path>.*(?:{_VIDEO}))(?P<mark>\s*,\s*|\s+)(?P<label>\S.*)", re.IGNORECASE)
_BEFORE_COMMA = re.compile(r"(?P<path>.*\.[A-Za-z]\w{1,4})(?P<mark>\s*,\s*)(?P<label>\S+)")
# A path in quotes, blanks, and a label without any or in quotes, too.
_QUOTED = re.compile(r'"(?P<path>(?:[^"]|"")+)"\s+(?P<label>"(?:[^"]|"")+"|[^",\s].*)')
_HOLDS_VIDEO = re.compile(rf"(?:{_VIDEO})(?:\s|$)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")
_ENDING = re.compile(r"\.(?=\d*[^\W\d])\w+")  # the .5 of a number is none
_NUMBERS = re.compile(r"\[?\s*\d+(?:\s*[,;|]\s*\d+|\s+\d+)+\s*\]?")
_A_LIST = re.compile(r"\[.*\]")
_BETWEEN_NAMES = re.compile(r"\s*[,;|\s]\s*")
_SURELY_BETWEEN = re.compile(r"\s*[;|]\s*")  # names hold commas and blanks
_HEADERS = ({"path", "video", "video_path", "file", "filename", "clip"}, {"label", "class", "category"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ListLine:
    """One line of a list or row of a table, before labels are numbered.

    Attributes:
        line: its number.
        path, label: as written.
        split: `train`, `val` or `test` of a table with such a column.
        segment: the part of the video that a table gives.
        id: of the clip; the path where empty.
    """

    line: int
    path: str
    label: str
    split: str | None = None
    segment: Segment | None = None
    id: str = ""


def parse_list(text: str, *, source: str) -> list[ListLine]:
    """Return the lines of a list, but for empty ones and a first one that names the columns.

    A line is `path label`, whose path may hold spaces; `path<TAB>label` or `path,label`, where both may. After a path
    with a video's ending, or in quotes, a label may have several words without that, but none that look like more columns.

    Raises: UsageError with the line number for a line without a label, or whose columns are in doubt.
    """
    out: list[ListLine] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        path, label = _split(line.strip(), f"{source}, line {number}")
        if out or path.lower() not in _HEADERS[0] or label.lower() not in _HEADERS[1]:
            out.append(ListLine(line=number, path=path, label=label))
    return out


def _split(line: str, where: str) -> tuple[str, str]:
    """Return path and label of a line. Raises: UsageError that begins with `where`."""
    parts = line.rsplit("\t", 1) if "\t" in line else line.rsplit(None, 1)
    if (
        "\t" in parts[0] and suffix_of(line.split("\t")[0].strip()) in VIDEO_SUFFIXES
    ):  # else a name may hold a TAB
        raise UsageError(
            f"{where}: {line!r} has {line.count(chr(9)) + 1} columns by its TABs; expected {LIST_FORMS}{_OR_NAMED}"
        )
    found = None if "\t" in line else _marked(line, parts[0] if len(parts) == 2 else "", where)
    path, label = (part.strip() for part in found or parts) if len(found or parts) == 2 else (line, "")
    if not path or not label:
        raise UsageError(f"{where}: {line!r} has no label; expected {LIST_FORMS}")
    return path, label


def _marked(line: str, before_last_word: str, where: str) -> tuple[str, str] | None:
    """Return the two columns where the label is not the last word of a line, but what follows a comma or an ending."""
    if _ENDING.fullmatch(os.path.splitext(before_last_word)[1]):
        return None
    quoted = _QUOTED.fullmatch(line)
    if quoted is not None and not _HOLDS_VIDEO.search(quoted["label"]):
        return _unquoted(f'"{quoted["path"]}"'), _one_label(quoted["label"], line, where)
    if line.startswith('"'):
        return _columns(_fields(line, where), line, where)
    match = _AFTER_VIDEO.fullmatch(line) or _BEFORE_COMMA.fullmatch(line)
    if match is None:
        return _columns(_fields(line, where), line, where) if "," in line and not before_last_word else None
    if match["mark"].isspace():
        return match["path"], _one_label(match["label"], line, where)
    return _columns([match["path"], *_fields(match["label"], where)], line, where)


def _one_label(label: str, line: str, where: str) -> str:
    """Return what follows a path and blanks. Raises: UsageError where it may be further columns, or a comment."""
    if label.startswith('"') and label.endswith('"') and len(label) > 2:
        return _unquoted(label)
    words = [word.strip(",;|") for word in label.split()]
    is_doubtful = "#" in label or any(map(_NUMBER.fullmatch, (words[0], words[-1])))
    if len(words) > 1 and is_doubtful and not _NUMBERS.fullmatch(label):  # several numbers are told as such
        raise UsageError(
            f"{where}: {line!r} has more than one word behind its path, of which {label!r} may be further columns or a "
            "comment; expected one label: leave the rest out, or write path<TAB>label where a label has such words"
        )
    return label


def _unquoted(text: str) -> str:
    return text[1:-1].replace('""', '"')


def _fields(text: str, where: str) -> list[str]:
    """Return what commas part, which quotes may hold."""
    try:
        return next(csv.reader([text], skipinitialspace=True))
    except csv.Error as error:
        raise UsageError(f"{where}: {text[:80]!r} cannot be read ({error}); expected {LIST_FORMS}") from error


def _columns(columns: Sequence[str], line: str, where: str) -> tuple[str, str]:
    if len(columns) == 1:
        raise UsageError(
            f"{where}: {line!r} is no path and label by its quotes; expected '\"path\" label', or path<TAB>label where "
            "quotes are part of a name"
        )
    if len(columns) != 2:
        raise UsageError(
            f"{where}: {line!r} has {len(columns)} columns by its commas; expected a path and one label: write "
            f"path<TAB>label where a path or a label holds commas{_OR_NAMED}"
        )
    return columns[0], columns[1]


def refuse_several_labels(rows: Sequence[ListLine], *, source: str) -> None:
    """Raise UsageError for a label of several numbers, or of several names that are, or recur as, labels of other lines."""
    names = {row.label for row in rows}
    parted = Counter(part for name in names for part in {*_parts(name, _SURELY_BETWEEN)} if part != name)

    def is_several(name: str) -> bool:
        parts = _parts(name, _BETWEEN_NAMES)
        recurs = any(parted[part] > 1 for part in _parts(name, _SURELY_BETWEEN))
        of_others = len(parts) > 1 and names.issuperset(parts)
        return bool(_NUMBERS.fullmatch(name) or _A_LIST.fullmatch(name)) or of_others or recurs

    if several := {*filter(is_several, names)}:
        row = next(row for row in rows if row.label in several)
        raise UsageError(
            f"{source}, line {row.line}: {row.label!r} are several labels (or a number of frames and a label); "
            "expected one label for each clip (where it is the name of one class, name all by --classes FILE)"
        )


def _parts(label: str, between: re.Pattern[str]) -> list[str]:
    return [part for part in between.split(label.strip("[]")) if part]
