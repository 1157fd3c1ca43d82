"""Catch what decord's FFmpeg writes to stderr: it conceals damaged frames, and only these messages tell of them."""

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from evl_cache.video.which_decord import decord_libraries, has_decord, load_decord

_AV_LOG_PRINT_LEVEL = 2
_MOST_BYTES = 1 << 16

_owns_stderr = False
_says_all = False


def own_stderr() -> None:
    """Let `heard` read this process's stderr, as nothing else writes to it and one clip is decoded at a time."""
    if not has_decord():
        return
    decord = load_decord()
    global _owns_stderr, _says_all
    _owns_stderr, _says_all = True, _say_levels()
    decord.logging.set_level(decord.logging.INFO if _says_all else decord.logging.ERROR)


def _say_levels() -> bool:
    """Make decord's FFmpeg write the level before each message, and return whether that was possible."""
    libraries = decord_libraries("libavutil")
    if not libraries:  # as on Windows and macOS: then only errors are shown
        return False
    ctypes.CDLL(str(libraries[0])).av_log_set_flags(_AV_LOG_PRINT_LEVEL)
    return True


def hears() -> bool:
    """Whether `heard` hears of all damage in this process: errors alone do not tell what was concealed."""
    return _owns_stderr and _says_all


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect the complaints that C libraries write to stderr meanwhile; none unless `own_stderr` was called."""
    complaints: list[str] = []
    if not _owns_stderr:
        yield complaints
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield complaints
            finally:
                os.dup2(kept, 2)
            file.seek(0)
            lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
            complaints += [told for line in lines if line.strip() and (told := complaint(line.strip()))]
    finally:
        os.close(kept)


def complaint(message: str) -> str | None:
    """Return what a message of decord's FFmpeg says against a file, or None for a remark.

    A remark that FFmpeg concealed part of a picture counts as a complaint: sometimes no error comes before it.
    """
    found = re.match(r"(?:\[[^]]* @ [^]]*\] )?(?:\[(\w+)\] )?(.*)", message)
    assert found is not None  # it matches everything
    level, text = found.groups()
    is_remark = level in ("warning", "info", "verbose", "debug") and not text.startswith("concealing")
    return None if is_remark else text.strip()[:160]
