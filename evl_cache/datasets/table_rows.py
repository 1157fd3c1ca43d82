"""Read tables of clips: CSV, TSV or semicolons with a header, and JSON lines with the same names."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from evl_cache.clips import Segment
from evl_cache.datasets.list_lines import ListLine
from evl_cache.datasets.split_folders import split_named
from evl_cache.datasets.table_columns import find_columns, is_header, kind_of, remark_of_unread
from evl_cache.datasets.text_file import read_json_entries
from evl_cache.errors import UsageError

_DELIMITERS = ("\t", ";", ",")
_JSON_LINE = re.compile(r'\s*\{\s*["}]')
_JSON_FORM = 'JSON objects like {"path": "a.mp4", "label": "run"}, one a line'
_SECONDS = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_CLOCK = re.compile(r"(?:(?P<h>\d+):)?(?P<m>\d{1,2}):(?P<s>\d{1,2}(?:\.\d*)?)", re.ASCII)
_COMMENT = re.compile(r"#(?:\s|#|$)")  # a video may be called #1.mp4
_FRAME = re.compile(r"\d{1,15}(?:\.0*)?", re.ASCII)
_Cells = Mapping[str, str]  # what a row says, by the kinds of its columns
Table = tuple[list[ListLine], list[str]]


def read_table(path: Path, text: str) -> Table | None:
    """Return the rows of a table with remarks on it; None where the text is none, but a plain list.

    Raises: UsageError with the line for whatever is wrong.
    """
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        entries = read_json_entries(path, expected=f"a list of {_JSON_FORM}", decoder=_DECODER)
        return _of_objects(entries, source=str(path))
    if path.suffix.lower() in (".jsonl", ".ndjson") or _JSON_LINE.match(text):
        return _of_objects(_json_lines(text, str(path)), source=str(path))
    return _of_csv(text, source=str(path))


def _of_csv(text: str, *, source: str) -> Table | None:
    lines = text.split("\n")
    first = next((n for n, line in enumerate(lines) if line.strip() and not _COMMENT.match(line)), None)
    if first is None:
        return None
    mark = max(
        _DELIMITERS,
        key=lambda mark: sum(kind_of(name.strip(' "')) is not None for name in lines[first].split(mark)),
    )
    words = lines[first].split()
    if len(words) > 2 and all(map(kind_of, words)) and mark not in lines[first]:
        raise UsageError(
            f"{source}, line {first + 1}: names columns ({' '.join(words)}) with blanks between them; expected commas, TABs or "
            "semicolons between columns, here and in the lines below"
        )
    if '"' not in lines[first] and not is_header(lines[first].split(mark)):
        return None
    comments = sum(map(bool, map(_COMMENT.match, lines)))
    kept = ["" if _COMMENT.match(line) else line for line in lines]
    records = _records(kept, first, mark, source)
    try:
        at, header = next(records)
    except UsageError:
        return None  # a first line with odd quotes is for the reader of lists to tell
    if not is_header(header):
        return None
    columns = find_columns([name for name in header if name], where=f"{source}, line {at}")
    place = {kind: header.index(name) for kind, name in columns.items()}
    rows, unnamed, beside = [], False, 0
    for line, fields in records:
        while len(fields) > len(header) and not fields[-1]:  # as spreadsheets write
            fields.pop()
        if len(fields) != len(header):
            raise UsageError(
                f"{source}, line {line}: {len(fields)} fields; expected {len(header)}, as the first line names "
                '(quote what holds the sign between columns: "a, b.mp4")'
            )
        unnamed |= any(field and not name for name, field in zip(header, fields, strict=True))
        cells = {kind: fields[number] for kind, number in place.items()}
        beside += _has_both_units(cells)
        rows.append(_row(cells, line, f"{source}, line {line}"))
    remarks = remark_of_unread((name for name in header if name), columns.values())
    remarks += ["a column without a name is not read"] if unnamed else []
    remarks += ["of rows with times and frames the times are read"] if beside else []
    remarks += [f"lines that begin with # are passed over: {comments}"] if comments else []
    return rows, remarks


def _records(lines: list[str], first: int, mark: str, source: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the stripped fields of each record that is not blank, with the line on which it begins."""
    rest = "\n".join(lines[first:])
    reader = csv.reader(io.StringIO(rest, newline=""), delimiter=mark, strict=True, skipinitialspace=True)
    while True:
        line = first + reader.line_num + 1
        try:
            fields = [field.strip() for field in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(
                f"{source}, line {line}: cannot be read ({error}); expected columns as the first line names them, "
                'quoted where they hold quotes or the sign between columns: "a ""b"".mp4"'
            ) from error
        if any(fields):
            yield line, fields


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key that occurs twice")
    return members


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_refuse_constant)


def _json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            yield line, _DECODER.decode(written.strip())
        except (ValueError, RecursionError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:100]
            raise UsageError(f"{source}, line {line}: not JSON ({reason}); expected {_JSON_FORM}") from error


def _of_objects(entries: Iterable[tuple[int, Any]], *, source: str) -> Table:
    rows, keys, read = [], dict[str, None](), set[str]()
    for line, value in entries:
        where = f"{source}, line {line}"
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {json.dumps(value)[:60]} is no object; expected {_JSON_FORM}")
        keys |= dict.fromkeys(value)
        columns = find_columns(list(value), where=where)
        read |= {*columns.values()}
        cells = {kind: _cell(kind, name, value[name], where) for kind, name in columns.items()}
        rows.append(_row(cells, line, where))
    return rows, remark_of_unread(keys, read)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "path": (str,),
    "label": (str, int),
    "split": (str,),
    "id": (str, int),
}


def _cell(kind: str, name: str, value: Any, where: str) -> str:
    """Return a value of JSON as a cell of a table has it."""
    if kind == "label" and isinstance(value, list):
        raise UsageError(
            f"{where}: {name!r} is {json.dumps(value)[:60]}, which are several labels; expected one label for each clip"
        )
    if value is None and kind != "path":
        return ""
    types = _TYPES.get(kind, (str, int, float))
    if isinstance(value, bool) or not isinstance(value, types):
        expected = " or ".join({str: "a text", int: "a whole number", float: "a number"}[t] for t in types)
        raise UsageError(f"{where}: {name!r} is {json.dumps(value)[:60]}; expected {expected}")
    return value.strip() if isinstance(value, str) else repr(value)


def _row(cells: _Cells, line: int, where: str) -> ListLine:
    if not cells["path"]:
        raise UsageError(f"{where}: no path; expected a path and one label for each clip")
    for kind in ("path", "label", "id"):
        _check_letters(kind, cells.get(kind, ""), where)
    split = cells.get("split")
    named = None if split is None else split_named(split)
    if split is not None and named is None:
        got = f"split {split!r:.60}" if split else "no split"
        raise UsageError(f"{where}: {got}; expected train, val (validation) or test in every line")
    segment = _segment(cells, where)
    default = cells["path"] if segment is None else f"{cells['path']}#{segment}"
    return ListLine(
        line=line,
        path=cells["path"],
        label=cells["label"],
        split=named,
        segment=segment,
        id=cells.get("id") or default,
    )


def _check_letters(kind: str, text: str, where: str) -> None:
    try:
        text.encode("utf-8", "surrogateescape")
        is_odd = "\0" in text or "\n" in text
    except UnicodeEncodeError:
        is_odd = True
    if is_odd:
        raise UsageError(
            f"{where}: {kind} {text[:60]!r} holds a line end or what is no letter; expected one line of text: is a quote "
            "missing, or one too many?"
        )


def _segment(cells: _Cells, where: str) -> Segment | None:
    """Return the part of a video that a row names: by times, where it has them as well as frames."""
    seconds = {kind: cells[kind] for kind in ("start", "end") if cells.get(kind)}
    frames = {kind: cells[kind] for kind in ("start_frame", "end_frame") if cells.get(kind)}
    if not seconds and not frames:
        return None
    if seconds and (alone := {kind for kind in frames if kind.removesuffix("_frame") not in seconds}):
        raise UsageError(
            f"{where}: {' and '.join(seconds)} in seconds, {' and '.join(sorted(alone))} in frames; expected both in one unit"
        )
    read, unit = (_second, "seconds") if seconds else (_frame, "frames")
    bounds = {kind.partition("_")[0]: read(kind, text, where) for kind, text in (seconds or frames).items()}
    start, end = bounds.get("start", 0.0), bounds.get("end")
    if end is not None and end <= start:
        raise UsageError(f"{where}: end {end:g} is not after start {start:g}; expected a later end")
    return Segment(unit=unit, start=start, end=end)


def _has_both_units(cells: _Cells) -> bool:
    times, frames = (any(map(cells.get, names)) for names in (("start", "end"), ("start_frame", "end_frame")))
    return times and frames


def _second(kind: str, text: str, where: str) -> float:
    clock = _CLOCK.fullmatch(text)
    if clock is not None and int(clock["m"]) < 60 and float(clock["s"]) < 60:
        return int(clock["h"] or 0) * 3600 + int(clock["m"]) * 60 + float(clock["s"])
    if _SECONDS.fullmatch(text) is None or (number := float(text)) >= 1e15:
        raise UsageError(
            f"{where}: {kind} {text!r:.60}; expected seconds from 0, such as 12.5, or 00:01:30.5"
        )
    return number


def _frame(kind: str, text: str, where: str) -> float:
    if _FRAME.fullmatch(text) is None:
        raise UsageError(f"{where}: {kind} {text!r:.60}; expected a whole number of a frame, from 0")
    return float(text)
