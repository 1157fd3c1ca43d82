"""What decord's FFmpeg says of a file: it conceals damaged frames, and only messages on stderr tell of them."""

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evl_cache.video.frames import has_decord

_AV_LOG_PRINT_LEVEL = 2
_MOST_BYTES = 1 << 16

_owns_stderr = False


def own_stderr() -> None:
    """Say that this process exists to decode, one clip at a time, and that its stderr is nobody else's."""
    if not has_decord():
        return
    import decord

    global _owns_stderr
    _owns_stderr = True
    decord.logging.set_level(decord.logging.INFO if _say_levels() else decord.logging.ERROR)


def _say_levels() -> bool:
    """Have decord's FFmpeg write the level of each message before it. Returns: whether it does."""
    import decord

    libraries = sorted((Path(decord.__file__).parent.parent / "decord.libs").glob("libavutil*"))
    if not libraries:  # as on Windows: errors alone are heard
        return False
    ctypes.CDLL(str(libraries[0])).av_log_set_flags(_AV_LOG_PRINT_LEVEL)
    return True


@contextmanager
def heard() -> Iterator[list[str]]:
    """Complaints that C libraries write to stderr meanwhile; none where stderr is not ours to take."""
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
    """What a message of decord's FFmpeg says against a file; None for remarks.

    That it made up part of a picture is said as a remark, sometimes with no error before it.
    """
    found = re.match(r"(?:\[[^]]* @ [^]]*\] )?(?:\[(\w+)\] )?(.*)", message)
    assert found is not None  # it matches everything
    level, text = found.groups()
    is_remark = level in ("warning", "info", "verbose", "debug") and not text.startswith("concealing")
    return None if is_remark else text.strip()[:160]
