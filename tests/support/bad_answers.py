"""The ways in which a server misbehaves, each as the bytes, pauses and breaks that a client gets to see.

A fault changes a right answer. `FAULTS` says of each which words a true line about it has, and whether a client that asks
again comes through where it passes.
"""

import gzip
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from typing import Literal

SILENCE, CUT, RESTART = "silence", "cut", "restart"
Step = bytes | float | Literal["silence", "cut", "restart"]  # sent; seconds waited; the end


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    head: str  # as it came
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def head(self, *, length: bool = True) -> bytes:
        headers = self.headers | ({"Content-Length": str(len(self.body))} if length else {})
        lines = [f"HTTP/1.1 {self.status} {_reason(self.status)}", *(f"{n}: {v}" for n, v in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def steps(self) -> list[Step]:
        return [self.head() + self.body]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a fault happens: `whole` is the file that was asked for, `elsewhere` the address of another server with it."""

    request: Request
    whole: bytes
    elsewhere: str
    rng: random.Random


Misbehave = Callable[[Answer, Scene], Sequence[Step]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to misbehave.

    Attributes:
        words: of which a line about it has one, where it stays.
        passes: a client that asks again comes through where the fault passes.
        harmless: an answer that is as good as the right one: a client may as well take it.
    """

    act: Misbehave
    words: str
    passes: bool = True
    harmless: bool = False
    waits: bool = False  # until the client gives up


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Odd"


def _status(status: int, **headers: str) -> Misbehave:
    body = b"<html><body>something is wrong</body></html>"
    return lambda answer, scene: Answer(
        status=status, headers={n.replace("_", "-"): v for n, v in headers.items()}, body=body
    ).steps()


def _retry_after_date(answer: Answer, scene: Scene) -> Sequence[Step]:
    headers = {"Retry-After": formatdate(time.time() + 1, usegmt=True)}
    return Answer(status=503, headers=headers, body=b"busy").steps()


def _delay(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [scene.rng.uniform(0.02, 0.2), *answer.steps()]


def _silence(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [SILENCE]


def _stops(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [answer.head() + answer.body[: len(answer.body) // 2], SILENCE]


def _cut_before(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [CUT]


def _cut_in_head(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [answer.head()[: scene.rng.randrange(5, 30)], CUT]


def _cut_in_body(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [answer.head() + answer.body[: scene.rng.randrange(max(1, len(answer.body)))], CUT]


def _flip(answer: Answer, scene: Scene) -> Sequence[Step]:
    if not answer.body:
        return answer.steps()
    body = bytearray(answer.body)
    for _ in range(scene.rng.randrange(1, 4)):
        body[scene.rng.randrange(len(body))] ^= 1 << scene.rng.randrange(8)
    if bytes(body) == answer.body:
        body[0] ^= 1
    return replace(answer, body=bytes(body)).steps()


def _other_range(answer: Answer, scene: Scene) -> Sequence[Step]:
    """A range that was not asked for, and the header says so."""
    size = len(scene.whole)
    if answer.status != 206 or size < 2:
        return answer.steps()
    start = scene.rng.randrange(1, size)
    if f"bytes {start}-" in answer.headers["Content-Range"]:
        start = start % (size - 1) + 1 if size > 2 else 0
    body = scene.whole[start : start + len(answer.body)]
    headers = answer.headers | {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{size}"}
    return replace(answer, headers=headers, body=body).steps()


def _other_bytes(answer: Answer, scene: Scene) -> Sequence[Step]:
    """The range that was asked for, by the header, and other bytes of the file."""
    if answer.status != 206 or len(answer.body) == len(scene.whole):
        return _flip(answer, scene)
    turned = answer.body[1:] + bytes([answer.body[0] ^ 1])
    return replace(answer, body=turned).steps()


def _whole_file(answer: Answer, scene: Scene) -> Sequence[Step]:
    headers = {name: value for name, value in answer.headers.items() if name != "Content-Range"}
    return (
        Answer(status=200, headers=headers, body=scene.whole).steps()
        if answer.status == 206
        else answer.steps()
    )


def _to(where: Callable[[Scene], str], status: int = 302) -> Misbehave:
    return lambda answer, scene: Answer(status=status, headers={"Location": where(scene)}).steps()


def _sign_in(answer: Answer, scene: Scene) -> Sequence[Step]:
    page = (
        b"<!DOCTYPE html><html><head><title>Sign in</title></head><body><form>Password</form></body></html>"
    )
    return Answer(status=200, headers={"Content-Type": "text/html; charset=utf-8"}, body=page).steps()


def _gzip(answer: Answer, scene: Scene) -> Sequence[Step]:
    headers = answer.headers | {"Content-Encoding": "gzip"}
    return replace(answer, headers=headers, body=gzip.compress(answer.body)).steps()


def _no_length(answer: Answer, scene: Scene) -> Sequence[Step]:
    closing = replace(answer, headers=answer.headers | {"Connection": "close"})
    return [closing.head(length=False) + answer.body, CUT]


def _chunked(answer: Answer, scene: Scene) -> Sequence[Step]:
    head = replace(answer, headers=answer.headers | {"Transfer-Encoding": "chunked"}).head(length=False)
    pieces = [answer.body[at : at + 4096] for at in range(0, len(answer.body), 4096)]
    return [head + b"".join(f"{len(p):x}\r\n".encode() + p + b"\r\n" for p in pieces) + b"0\r\n\r\n"]


def _other_tag(answer: Answer, scene: Scene) -> Sequence[Step]:
    """The tag of another version, with the bytes of this one."""
    return replace(answer, headers=answer.headers | {"ETag": f'"{scene.rng.randrange(1 << 30):x}"'}).steps()


def _restart(answer: Answer, scene: Scene) -> Sequence[Step]:
    return [RESTART]


_BROKEN = r"closed|broke|cut|ended|end of|reset|incomplete|too few|fewer|short|no answer|disconnect|abort"
_SILENT = r"silent|no answer|not answer|nothing|timed out|no byte|in time|stopp?ed|patience"
_DAMAGE = (
    r"damaged|not what|changed|promis|JSON|not a |is no |expected|another|differ|damage|unexpected|mismatch|instead of|"
    r"cannot be read|does not match"
)
_GONE = r"no such|no cache|not there|changed|404|missing|not complete|no file|lost|removed|no manifest"
FAULTS: dict[str, Fault] = {
    **{
        str(status): Fault(act=_status(status), words=rf"\b{status}\b|busy|overloaded|server error")
        for status in (429, 500, 502, 503, 504)
    },
    "429 with Retry-After": Fault(act=_status(429, Retry_After="1"), words=r"\b429\b|busy|too many"),
    "503 with a date": Fault(act=_retry_after_date, words=r"\b503\b|busy"),
    "400": Fault(act=_status(400), words=r"\b400\b", passes=False),
    "401": Fault(act=_status(401, WWW_Authenticate='Basic realm="x"'), words=r"access denied|401|password", passes=False),
    "403": Fault(act=_status(403), words=r"access denied|403|refuse|forbid", passes=False),
    "404": Fault(act=_status(404), words=_GONE, passes=False),
    "delay": Fault(act=_delay, words="(?!)", harmless=True),
    "silence": Fault(act=_silence, words=_SILENT, waits=True),
    "stops in the middle": Fault(act=_stops, words=_SILENT, waits=True),
    "cut before": Fault(act=_cut_before, words=_BROKEN),
    "cut in headers": Fault(act=_cut_in_head, words=_BROKEN),
    "cut in the body": Fault(act=_cut_in_body, words=_BROKEN),
    "flip": Fault(act=_flip, words=_DAMAGE, passes=False),
    "another range": Fault(act=_other_range, words=rf"range|other bytes (came )?than|{_DAMAGE}", passes=False),
    "other bytes": Fault(act=_other_bytes, words=_DAMAGE, passes=False),
    "the whole file": Fault(act=_whole_file, words=r"range|whole|other bytes", harmless=True),
    "redirect on this host": Fault(
        act=_to(lambda scene: scene.request.path + "?again=1"), words=r"redirect|\b30\d\b", harmless=True
    ),
    "redirect elsewhere": Fault(
        act=_to(lambda scene: scene.elsewhere + scene.request.path, 307), words=r"redirect|\b30\d\b", harmless=True
    ),
    "redirect in a circle": Fault(act=_to(lambda scene: scene.request.path), words=r"circle|\b30\d\b", passes=False),
    "sign-in page": Fault(act=_sign_in, words="page|HTML|html|sign", passes=False),
    "gzip": Fault(act=_gzip, words=r"gzip|compress|encod", passes=False),
    "no length": Fault(act=_no_length, words="length", harmless=True),
    "chunked": Fault(act=_chunked, words="length|chunked", harmless=True),
    "another tag": Fault(act=_other_tag, words="changed|another", passes=False, harmless=True),
    "restart": Fault(act=_restart, words=rf"refused|{_BROKEN}"),
}  # fmt: skip


def names_a_cause(line: str, served: set[str]) -> bool:
    """Whether an error line has words of a fault that a server showed."""
    return any(re.search(FAULTS[name].words, line) for name in served)
