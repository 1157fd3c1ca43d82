"""`evl-cache check`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from evl_cache.extract_options import EXTRACT_OPTIONS, Role, options_with

from .common import Command, human_bytes, print_json, printable
from .extract_flags import extract_flags, hidden_flag, make_request

if TYPE_CHECKING:
    from evl_cache.extract.check import Check, Cost, SplitCheck

EXAMPLES = """
evl-cache check --dataset folder --root clips
evl-cache check --dataset list --list clips.txt --root videos --json
"""
_JOINED = "\N{NO-BREAK SPACE}"  # between a class and its number, which stay in one line
_WIDTH, _INDENT = 80, 10
_MOST_NOTES, _MOST_NAMED = 4, 5


@click.command(
    cls=Command,
    name="check",
    examples=EXAMPLES,
    params=[hidden_flag(option) for option in EXTRACT_OPTIONS if Role.REQUEST not in option.role],
)
@extract_flags(options_with(Role.REQUEST))
@click.option("--json", "as_json", is_flag=True, help="Report as JSON, with all classes.")
def command(as_json: bool, **given: Any) -> int:
    """What extract with the same options would work on, before any work.

    Splits, classes, first clips, files that are missing or passed over, clips that are too short. Builds no tower,
    fetches no weights, writes nothing. Exit status: 0 where extract would begin, 1 where it would refuse, 2 where
    the data set or the options cannot be read.
    """
    from evl_cache.extract.check import check

    found = check(make_request(given))
    if as_json:
        print_json(found.to_json())
    else:
        for line in _lines(found):
            click.echo(line)
    return 0 if found.would_begin else 1


def _lines(found: Check) -> Iterator[str]:
    for split, cost in found.splits:
        yield from _of_split(split, cost)
    if found.in_both:
        yield from _wrapped("both", f"{len(found.in_both)} in two splits: {_some(found.in_both)}")
    for name, classes in found.only_in.items():
        yield from _wrapped(
            "one only", f"classes with clips in {name} only ({len(classes)}): {_some(classes)}"
        )
    if found.cache is not None:
        yield from _wrapped("cache", str(found.cache))
    yield "extract would begin" if found.would_begin else "extract would refuse to begin"


def _of_split(split: SplitCheck, cost: Cost) -> Iterator[str]:
    yield printable(split.title)
    yield from _wrapped("read from", split.source)
    yield from _wrapped("classes", split.classes_told)
    for number, (clip, label) in enumerate(split.first):
        yield from _wrapped("first" if not number else "", f"{clip} is {label}")
    yield from _wrapped("views", _views(split))
    size = f"{cost.samples} samples, about {human_bytes(cost.expected_bytes)}"
    yield from _wrapped("size", f"{size} ({human_bytes(cost.raw_bytes)} before the codec)")
    for note in split.notes[:_MOST_NOTES]:
        yield from _wrapped("note", note)
    if (more := len(split.notes) - _MOST_NOTES) > 0:
        yield from _wrapped("note", f"… {more} more (--json)")
    if cost.refusal is not None:
        yield from _wrapped("refused", cost.refusal)
    elif cost.missing:
        yield from _wrapped("missing", f"{len(cost.missing)}, which is allowed: {_some(cost.missing)}")


def _views(split: SplitCheck) -> str:
    views = split.views
    if views.stride is None:
        return f"{views.summary} of {views.frames} frames, {views.sampling}"
    spread = ": spread over the clip" if views.stride == "auto" else ""
    return f"{views.summary} of {views.frames} frames, stride {views.stride}{spread}"


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f", … {len(every) - _MOST_NAMED} more" if len(every) > _MOST_NAMED else ""
    return ", ".join(every[:_MOST_NAMED]) + more


def _wrapped(title: str, text: str) -> list[str]:
    """Return a text beside its title, in lines of a terminal's width."""
    lines = textwrap.wrap(
        printable(text),
        _WIDTH,
        initial_indent=f"  {title:<{_INDENT}}",
        subsequent_indent=" " * (_INDENT + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_JOINED, " ") for line in lines]
