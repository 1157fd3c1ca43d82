"""Fenced blocks of a Markdown page, and what is to be done with each.

A block of `bash` or `python` is run, unless the line before it says why not:

    <!-- not run: REASON -->              shown only
    <!-- tested by tests/ROOM/test_NAME.py --> run there

Commands that a page needs but does not show stand in a comment of their own, `<!-- setup`, commands, `-->`. Every
other language is shown only.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = ("bash", "python")
SHOWN = ("text", "json", "mermaid", "yaml", "toml", "csv")
_COMMANDS = re.compile(r"^\s*(\$ |evl-cache |python3? -m |make |pip install|torchrun |git )", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """language: of the fence, `setup` for a comment. line: of the file, from 1. why_not: not run here, and why."""

    language: str
    text: str
    line: int
    why_not: str | None = None
    tested_by: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """In the order of the page. Raises: ValueError for a fence that is not closed."""
    lines = page.read_text(encoding="utf-8").split("\n")
    number = 0
    while number < len(lines):
        opened = re.fullmatch(r"( *)```(\S*)", lines[number])
        if lines[number].startswith("<!-- setup"):
            end = lines.index("-->", number)
            yield Block(language="setup", text="\n".join(lines[number + 1 : end]), line=number + 1)
        elif opened:
            closing = opened[1] + "```"
            if closing not in lines[number + 1 :]:
                raise ValueError(f"{page}:{number + 1}: fence is not closed")
            end = lines.index(closing, number + 1)
            before = lines[number - 1].strip() if number else ""
            why_not = re.fullmatch(r"<!-- not run: (.+) -->", before)
            tested_by = re.fullmatch(r"<!-- tested by (\S+) -->", before)
            yield Block(
                language=opened[2],
                text="\n".join(line.removeprefix(opened[1]) for line in lines[number + 1 : end]),
                line=number + 1,
                why_not=why_not[1] if why_not else None,
                tested_by=tested_by[1] if tested_by else None,
            )
        else:
            end = number
        number = end + 1


def objections(page: Path, root: Path) -> list[str]:
    """What is wrong with the fences of a page, a line each."""
    found = []
    for block in blocks(page):
        place = f"{page.name}:{block.line}"
        if block.language not in (*RUN, *SHOWN, "setup"):
            found.append(f"{place}: language {block.language!r}; write ```bash, ```python or ```text")
        # The command reference is help texts; tests/cli/test_cli.py runs their examples.
        if block.language == "text" and page.name != "commands.md" and _COMMANDS.search(block.text):
            found.append(f"{place}: commands in a block of text; write ```bash, which is run")
        if block.why_not is not None and len(block.why_not.split()) < 3:
            found.append(f"{place}: 'not run: {block.why_not}' is no reason")
        if block.tested_by is not None:
            test = root / block.tested_by
            if not test.is_file() or page.name not in test.read_text(encoding="utf-8"):
                found.append(f"{place}: {block.tested_by} does not read this page")
    return found


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Lines of a shell block as (line, words); a backslash joins lines; comments are left out."""
    for line in text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line, comments=True)
        if words:
            yield line, words
