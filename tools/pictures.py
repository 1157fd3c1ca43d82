"""Pictures of what commands print, for the docs: real output in the shape of a terminal, as SVG.

python -m tools.pictures --out docs/pictures --run RUN --cache CACHE

RUN and CACHE are of a finished `evl-cache demo --out DIR`: DIR/runs/with-temporal-modules, DIR/caches/train.
"""

import fcntl
import html
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import click

COLUMNS = 100
_PROMPT, _TEXT, _GROUND, _FRAME = "#7FC97F", "#E6E6E6", "#1E1E2E", "#3A3A4A"
_WIDTH, _HEIGHT, _MARGIN, _BAR = 8.43, 19.0, 18.0, 34.0  # of a character, a line; around; the window's bar
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def output_of(command: list[str], *, until: re.Pattern[str] | None = None) -> list[str]:
    """Lines as a terminal shows them at the end, or when `until` was first seen: then the command is stopped."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm"}
    running = subprocess.Popen(
        [sys.executable, "-m", "evl_cache_cli", *command],
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
    )
    os.close(child)
    seen = b""
    while True:
        try:
            got = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        seen += got
        if not got or (until is not None and until.search(seen.decode(errors="ignore"))):
            running.terminate()
            break
    running.wait()
    os.close(parent)
    text = _ESCAPES.sub("", seen.decode(errors="ignore")).replace("\r\n", "\n")
    return [line.split("\r")[-1].rstrip() for line in text.rstrip().split("\n")]


def as_svg(command: str, lines: list[str]) -> str:
    """A window with the command and what it printed."""
    shown = [("$ " + command, _PROMPT), *((part, _TEXT) for line in lines for part in _folded(line))]
    width = _MARGIN * 2 + _WIDTH * max(40, *(len(text) for text, _ in shown))
    height = _BAR + _MARGIN + _HEIGHT * len(shown)
    out = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'role="img" aria-label="{html.escape(command)}">'
        ),
        f'<rect width="100%" height="100%" rx="8" fill="{_GROUND}" stroke="{_FRAME}"/>',
        *(f'<circle cx="{18 + 16 * i}" cy="17" r="5" fill="{_FRAME}"/>' for i in range(3)),
        '<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,\'DejaVu Sans Mono\',monospace" font-size="14">',
    ]
    for number, (text, colour) in enumerate(shown):
        y = _BAR + _HEIGHT * (number + 0.75)
        # Columns are placed one by one: they stand below each other whatever font the reader's machine has.
        out.extend(
            f'<text x="{_MARGIN + _WIDTH * part.start():.1f}" y="{y:.1f}" fill="{colour}" xml:space="preserve" '
            f'textLength="{_WIDTH * len(part[0]):.1f}" lengthAdjust="spacingAndGlyphs">{html.escape(part[0])}</text>'
            for part in re.finditer(r"\S+( \S+)*", text)
        )
    return "\n".join([*out, "</g>", "</svg>"]) + "\n"


def _folded(line: str) -> list[str]:
    return [line[i : i + COLUMNS] for i in range(0, len(line), COLUMNS)] or [""]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--cache", type=click.Path(path_type=Path, exists=True), required=True)
def main(out: Path, run: Path, cache: Path) -> None:
    """Make all pictures of commands anew."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "help.svg").write_text(as_svg("evl-cache --help", output_of(["--help"])), encoding="utf-8")
    wrong = ["eval", "--cache", str(cache / "nothing"), "--run", str(run)]
    shown = "evl-cache eval --cache caches/mine --run runs/first"
    lines = [line.replace(str(cache / "nothing"), "caches/mine") for line in output_of(wrong)]
    (out / "error.svg").write_text(as_svg(shown, lines), encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        train = [
            "train",
            "--cache",
            str(cache),
            "--val-cache",
            str(cache.parent / "val"),
            "--head",
            "decoder3",
        ]
        lines = output_of(
            [*train, "--out", f"{scratch}/run", "--epochs", "2"], until=re.compile(r"4\d%.*loss")
        )
    progress = [line for line in lines if "loss" in line][-1:]
    shown = "evl-cache train --dataset folder --head decoder3"
    (out / "progress.svg").write_text(as_svg(shown, progress), encoding="utf-8")


if __name__ == "__main__":
    main()
