"""A directory that nobody can write, not even root: mounted over itself, read-only."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[Path]:
    """Mount a directory read-only over itself. Skips the test where this process may not mount."""
    try:
        _mount("--bind", str(directory), str(directory))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a directory read-only here: needs root and `mount`")
    try:
        _mount("-o", "remount,bind,ro", str(directory))
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)
