"""Read a file that names the classes: `--classes FILE` of lists and of imported heads."""

import csv
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from evl_cache.clips import MAX_CLASSES, whole_number
from evl_cache.datasets.text_file import numbered_lines, read_text
from evl_cache.errors import UsageError

_IDS = {
    "", "id", "class_id", "classid", "class_index", "class_idx", "label_id", "label_index", "label_idx", "index", "idx", "number"
}  # fmt: skip
_NAMES = {"name", "class", "label", "class_name", "classname", "label_name", "names", "classes", "labels"}
_NUMBERED = re.compile(r"\d+(?:\s*[,;:\t]\s*|\s+)\S.*")
_EXPECTED = "one name a line, or a table 'id,name' as Kinetics has it"


def read_class_names(path: Path) -> tuple[str, ...]:
    """Return the names of classes in their order: one a line, or a table with the header `name` or `id,name`.

    Raises: UsageError where it cannot be read, is empty, a name stands twice, or the ids are not 0, 1, … once each.
    """
    text = read_text(path, expected=_EXPECTED)
    if "\0" in text:
        raise UsageError(f"{path}: not UTF-8 text (it holds zeros); expected {_EXPECTED}")
    lines = [(number, line) for number, line in numbered_lines(text) if not line.startswith("# ")]
    mark = _mark(lines[0][1]) if lines else ","
    header = _fields(lines[0][1], mark) if lines else []
    if len(header) == 1 and header[0] in _NAMES and len(lines) > 1:
        lines = lines[1:]
    elif len(header) > 1 and {*header} & _IDS and {*header} & _NAMES:
        lines = _by_id(lines[1:], path, header, mark)
    elif len(lines) > 1 and all(_NUMBERED.fullmatch(line) for _, line in lines):
        raise UsageError(
            f"{path}, line {lines[0][0]}: {lines[0][1][:60]!r} and all others are a number and a name; expected {_EXPECTED}: "
            "put a line id,name before them, or leave the numbers out"
        )
    if not 0 < len(lines) < MAX_CLASSES:
        raise UsageError(
            f"{path}: names {len(lines)} classes; expected {_EXPECTED}, and fewer than {MAX_CLASSES}"
        )
    seen: dict[str, int] = {}
    for number, name in lines:
        if name in seen:
            raise UsageError(
                f"{path}, line {number}: {name!r} stands in line {seen[name]}, too; expected each class once"
            )
        seen[name] = number
    return tuple(seen)


def number_by_names(
    labels: Sequence[str], classes: Sequence[str], *, path: Path, source: str, lines: Sequence[int]
) -> list[int]:
    """Return the class number of each label: one of the names, or throughout numbers below their count.

    Where names of `classes` are numbers themselves, labels are names.

    Raises: UsageError with the line for a label that is no class.
    """
    index = {name: number for number, name in enumerate(classes)}
    distinct = list(dict.fromkeys(labels))

    def where(label: str) -> str:
        return f"{source}, line {lines[labels.index(label)]}"

    numbers = {label: number for label in distinct if (number := whole_number(label)) is not None}
    if len(numbers) == len(distinct) and all(whole_number(name) is None for name in classes):
        for label, number in numbers.items():
            if number >= len(classes):
                raise UsageError(
                    f"{where(label)}: label {label}; expected numbers below {len(classes)}, the number of classes of {path}"
                )
        index = numbers
    for label in distinct:
        if label not in index:
            near = get_close_matches(label, classes, n=3, cutoff=0.6) or classes[:1]
            raise UsageError(
                f"{where(label)}: label {label!r} is none of the {len(classes)} classes of {path}; expected one of "
                f"them, such as {', '.join(map(repr, near))}"
            )
    return [index[label] for label in labels]


def _mark(header: str) -> str:
    return next((mark for mark in "\t;" if mark in header), ",")


def _fields(line: str, mark: str) -> list[str]:
    return [field.strip().lower() for field in next(csv.reader([line], delimiter=mark), [])]


def _by_id(lines: list[tuple[int, str]], path: Path, header: list[str], mark: str) -> list[tuple[int, str]]:
    """Return lines and names in the order of their ids."""
    places = [next(n for n, name in enumerate(header) if name in names) for names in (_IDS, _NAMES)]
    found: dict[int, tuple[int, str]] = {}
    for number, line in lines:
        fields = [field.strip() for field in next(csv.reader([line], delimiter=mark), [])]
        index, name = (fields[place] for place in places) if len(fields) == len(header) else ("", "")
        if not index.isdecimal() or not name or int(index) >= len(lines) or int(index) in found:
            raise UsageError(
                f"{path}, line {number}: {line[:60]!r} is no id and name; expected the ids 0 to {len(lines) - 1}, each once, "
                "and a name quoted where it holds a comma"
            )
        found[int(index)] = (number, name)
    return [found[index] for index in sorted(found)]
