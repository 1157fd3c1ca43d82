"""The directory of local copies of remote caches: how much they may take, and what is removed when they take more.

`$EVL_CACHE_COPY_ROOT` (default: `evl-cache` in the user's cache directory) and `$EVL_CACHE_COPY_GB` (default: half of
what was free when the first copy was made there by this process). All copies there share the limit.
"""

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

from evl_cache.errors import UsageError
from evl_cache.store.disk.publish import make_directories

ROOT_VARIABLE, LIMIT_VARIABLE = "EVL_CACHE_COPY_ROOT", "EVL_CACHE_COPY_GB"
IN_USE_S = 2.0  # a file used so recently is not removed: a batch may be reading it
_DEFAULT_SHARE = 0.5
_LOOKS_PER_LIMIT = 32  # how often the files are counted while a limit's worth is fetched
_FREED_SHARE = 0.1  # beyond what is needed: so that not every fetch has to remove something


class CopyRoot:
    """The directory of all copies. Shard files in it are removed, the least recently used first."""

    def __init__(self, path: Path | None = None, limit_nbytes: int | None = None) -> None:
        self.path = path or default_copy_root()
        make_directories(self.path)
        self.limit_nbytes = limit_nbytes or default_limit(self.path)
        self._lock = threading.Lock()
        self._since_look = self.limit_nbytes  # look at once

    def make_room(self, nbytes: int) -> None:
        """Remove files until so many bytes fit, but none that is in use. Call it before they are written."""
        with self._lock:
            self._since_look += nbytes
            if self._since_look < self.limit_nbytes // _LOOKS_PER_LIMIT:
                return
            self._since_look = 0
            files = sorted(self._files())
            taken = sum(size for _, size, _ in files)
            if taken + nbytes <= self.limit_nbytes:
                return
            free = taken + nbytes - int(self.limit_nbytes * (1 - _FREED_SHARE))
            for used, size, path in files:
                if free <= 0 or time.time() - used < IN_USE_S:
                    break
                with contextlib.suppress(OSError):  # another process was faster
                    path.unlink()
                    free -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes on the disk, path) of every shard file of every copy."""
        out = []
        for directory, _, names in os.walk(self.path):
            if f"{os.sep}c{os.sep}" not in directory[len(str(self.path)) :]:
                continue
            for name in names:
                with contextlib.suppress(OSError):
                    found = os.stat(os.path.join(directory, name))
                    out.append((found.st_mtime, found.st_blocks * 512, Path(directory) / name))
        return out


def default_copy_root() -> Path:
    """Return where copies lie, as the environment says."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evl-cache"


def default_limit(path: Path) -> int:
    """Return the bytes that copies may take, as the environment says. Raises: UsageError where it says no number."""
    named = os.environ.get(LIMIT_VARIABLE)
    if not named:
        return max(1, int(shutil.disk_usage(path).free * _DEFAULT_SHARE))
    try:
        limit = int(float(named) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit < 1:
        raise UsageError(f"{LIMIT_VARIABLE} is {named!r}; expected gigabytes, such as 200")
    return limit
