"""Read annotation files whole, with the line of whatever is wrong."""

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evl_cache.errors import UsageError

_BLANKS = re.compile(r"[ \t\n\r]*")


def read_text(path: Path, *, expected: str) -> str:
    """Return the text of a UTF-8 file, without a byte order mark; line ends stay as they are.

    Raises: UsageError where it cannot be read, is not UTF-8, or holds nothing.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 ({error.reason}); expected {expected}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"{path}: cannot be read ({reason}); expected {expected}") from error
    if not text.strip():
        raise UsageError(f"{path}, line 1: the file is empty; expected {expected}")
    return text


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not empty, stripped, each with its number from 1."""
    lines = re.split(r"\r\n|\n|\r", text)
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def read_json_entries(
    path: Path, *, expected: str, decoder: json.JSONDecoder | None = None
) -> list[tuple[int, Any]]:
    """Return the entries of a JSON list, each with the line on which it starts.

    They are decoded one by one, as `json.loads` does not tell where a value was, and errors should.

    Args:
        decoder: of one entry; it may refuse more than the usual one, by ValueError.

    Raises: UsageError for what is not JSON, not a list, or nested too deep to read.
    """
    text = read_text(path, expected=expected)
    decoder = decoder or json.JSONDecoder()
    at = _skip_blanks(text, 0)
    if text[at] != "[":
        raise _wrong(path, _line(text, at), f"begins with {text[at : at + 20]!r}", expected)
    entries: list[tuple[int, Any]] = []
    at = _skip_blanks(text, at + 1)
    line, counted = 1, 0  # the line of the place up to which lines are counted
    if text[at : at + 1] == "]":
        raise _wrong(path, _line(text, at), "the list is empty", expected)
    while True:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decode(decoder, text, at, path=path, line=line, expected=expected)
        entries.append((line, value))
        at = _skip_blanks(text, at)
        separator = text[at : at + 1]
        at = _skip_blanks(text, at + 1)
        if separator == "]" and at >= len(text):
            return entries
        if separator != ",":
            found = (
                f"something after the end of the list: {text[at : at + 20]!r}"
                if separator == "]"
                else (f"{separator!r} after an entry" if separator else "the list does not end")
            )
            raise _wrong(path, _line(text, at), found, expected)


def read_json_object(path: Path, *, expected: str) -> tuple[dict[str, Any], Callable[[str], int]]:
    """Return the members of a JSON object, and what tells a key's line: to look for it takes the time of the whole text.

    Raises: UsageError for what is not JSON, not an object, holds a key twice, or is nested too deep to read.
    """
    text = read_text(path, expected=expected)

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise _wrong(path, _line_of_key(text, twice, last=True), f"{twice!r} occurs twice", expected)
        return out

    decoder = json.JSONDecoder(object_pairs_hook=members)
    at = _skip_blanks(text, 0)
    value, end = _decode(decoder, text, at, path=path, line=_line(text, at), expected=expected)
    if not isinstance(value, dict):
        raise _wrong(path, _line(text, at), f"holds {type(value).__name__}, not an object", expected)
    if _skip_blanks(text, end) < len(text):
        raise _wrong(path, _line(text, end), "something after the end of the object", expected)
    return value, partial(_line_of_key, text)


def _decode(
    decoder: json.JSONDecoder, text: str, at: int, *, path: Path, line: int, expected: str
) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _wrong(path, error.lineno, f"not JSON ({error.msg}, column {error.colno})", expected) from error
    except UsageError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise _wrong(path, line, f"not readable JSON ({error})", expected) from error
    except RecursionError:
        raise _wrong(path, line, "nested too deep", expected) from None


def _skip_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _line_of_key(text: str, key: str, *, last: bool = False) -> int:
    quoted = json.dumps(key, ensure_ascii=False)
    return _line(text, max(text.rfind(quoted) if last else text.find(quoted), 0))


def _wrong(path: Path, line: int, found: str, expected: str) -> UsageError:
    return UsageError(f"{path}, line {line}: {found}; expected {expected}")
