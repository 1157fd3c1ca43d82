"""What every server of the tests was sent, and what of it, or of what was written and shown, gives a credential away.

A server says what was given for it; `check` runs after every test (tests/conftest.py) and fails it where a server saw any
other credential, a URL carried one, or a file or an output holds one.
"""

import base64
import binascii
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from tests.support.credentials import forms, is_declared, secrets_in

# Headers that are credentials whatever they hold.
_LOGINS = ("authorization", "proxy-authorization", "x-amz-security-token")
_MOST_NBYTES = 64 << 20  # of a file that is searched
_SEARCHED = re.compile(b"|".join(re.escape(form.encode()) for _, form in forms()))


@dataclass
class Record:
    """The requests that one server was sent.

    Attributes:
        name: of the server, for messages.
        given: texts; whatever logs in here must hold one of them. None at all: nothing may log in.
        requests: each as its first line and its headers, not looked at yet.
        fetch: reads what a server in another process has written down.
        seen: how many were looked at.
    """

    name: str
    given: tuple[str, ...] = ()
    requests: list[str] = field(default_factory=list)
    fetch: Callable[[], Iterable[str]] | None = None
    has_ended: bool = False
    seen: int = 0

    def take(self) -> list[str]:
        """The requests since the last call."""
        if self.fetch is not None:
            self.requests += self.fetch()
        found, self.requests = self.requests, []
        self.seen += len(found)
        return found

    def problems(self) -> list[str]:
        """What was sent here since the last call and had not been given for this server."""
        return [
            f"{self.name}: {trouble}" for request in self.take() for trouble in _troubles(request, self.given)
        ]


_records: list[Record] = []
_shown: list[str] = []


@contextlib.contextmanager
def recorded(
    name: str, *, given: Iterable[str] = (), fetch: Callable[[], Iterable[str]] | None = None
) -> Iterator[Record]:
    """The record of a server that runs meanwhile."""
    record = Record(name, tuple(given), fetch=fetch)
    _records.append(record)
    try:
        yield record
    finally:
        if fetch is not None:  # its log may be gone by the time of the look
            record.requests += fetch()
            record.fetch = None
        record.has_ended = True


def lines_added_to(log: Path) -> Callable[[], list[str]]:
    """A function that returns the lines that were added to a file since its last call."""
    position = 0

    def added() -> list[str]:
        nonlocal position
        if not log.exists():
            return []
        with log.open("rb") as file:
            file.seek(position)
            text = file.read()
        whole = text.rpartition(b"\n")[0]
        position += len(whole) + 1 if whole else 0
        return whole.decode("utf-8", "replace").splitlines()

    return added


def as_text(first_line: str, headers: Iterable[tuple[str, str]]) -> str:
    return "\n".join([first_line, *(f"{name}: {value}" for name, value in headers)])


def _troubles(request: str, given: tuple[str, ...]) -> Iterator[str]:
    first, *headers = request.split("\n")
    if found := secrets_in(first):
        yield f"the URL holds {sorted(found)}: {first}"
    for header in headers:
        name, _, value = header.partition(": ")
        if name.lower() in _LOGINS and not any(text in _decoded(value) for text in given):
            yield f"{first}: sent {name}: {_decoded(value)}, given for this server: {list(given) or 'nothing'}"
        elif found := {secret for secret in secrets_in(value) if not any(text in secret for text in given)}:
            yield f"{first}: sent {sorted(found)} in {name}, given for this server: {list(given) or 'nothing'}"


def _decoded(value: str) -> str:
    scheme, _, words = value.partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            return base64.b64decode(words).decode()
    return value


def note_shown(*texts: str) -> None:
    """What a command in another process printed."""
    if _records:
        _shown.extend(texts)


def keep_shown(patch: pytest.MonkeyPatch) -> None:
    """Note what tests take of their captured output themselves, and what commands print in this process."""
    from click.testing import CliRunner

    def noting(owner: Any, name: str, texts: Callable[[Any], Iterable[str]]) -> None:
        real = getattr(owner, name)

        @wraps(real)
        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            note_shown(*(text for text in texts(result) if isinstance(text, str)))
            return result

        patch.setattr(owner, name, call)

    noting(pytest.CaptureFixture, "readouterr", lambda result: result)
    noting(CliRunner, "invoke", lambda result: [result.output, str(result.exception or "")])


def found_in_files(folder: Path) -> list[str]:
    """Files below a folder that hold a secret which the test did not write there itself."""
    return [
        f"{path}: holds a secret"
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and not is_declared(path.absolute()) and _holds(path)
    ]


def _holds(path: Path) -> bool:
    try:
        if path.stat().st_size > _MOST_NBYTES:
            return False
        return _SEARCHED.search(path.read_bytes()) is not None
    except OSError:  # it may be a file that nobody is allowed to read, or one that has just gone
        return False


def problems(folder: Path | None, shown: Iterable[str]) -> list[str]:
    """All that has gone where it should not since the last call. Costs nothing where no server ran.

    Args:
        folder: of the test. shown: what it printed and logged.
    """
    if not _records:
        return []
    found = [problem for record in _records for problem in record.problems()]
    for text in (*_shown, *shown):
        found += [f"{secret} was printed or logged" for secret in sorted(secrets_in(text))]
    if folder is not None and folder.is_dir():
        found += found_in_files(folder)
    _shown.clear()
    _records[:] = [record for record in _records if not record.has_ended]
    return found
