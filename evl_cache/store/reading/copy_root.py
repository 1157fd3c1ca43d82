"""The directory of local copies of remote caches: how much they may take, and what is removed when they take more.

`$EVL_CACHE_COPY_ROOT` (default: `evl-cache` in the user's cache directory) and `$EVL_CACHE_COPY_GB` (default: half of
what was free when the first copy was made there by this process). All copies there share the limit.

The directory may hold anything else, even caches and a person's own files: nothing is looked at or removed but shard
files, under their exact names, of directories that are named by a cache digest and hold the marker of a copy.
"""

import contextlib
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheError, UsageError
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.file_system import check_no_links, read_limited
from evl_cache.store.format.description import read_description
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.layout import (
    CLIPS_NAME,
    DONE_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    array_layouts,
)
from evl_cache.store.shards.metadata import METADATA_NAME

ROOT_VARIABLE, LIMIT_VARIABLE = "EVL_CACHE_COPY_ROOT", "EVL_CACHE_COPY_GB"
IN_USE_S = 2.0  # a file used so recently is not removed: a batch may be reading it
_DEFAULT_SHARE = 0.5
_LOOKS_PER_LIMIT = 32  # how often the files are counted while a limit's worth is fetched
MARKER_NAME = "evl-cache-copy.json"  # only directories that hold it are copies
_MARKER = re.compile(rb'\{"cache_digest":"([0-9a-f]{64})"\}\n')
_DIGITS = 32  # of the cache digest, in the copy's name
_COPY_NAME = re.compile(f"[0-9a-f]{{{_DIGITS}}}")
_STAGED = re.compile(r"\.tmp-[0-9]+-.+")  # files on their way, beside their names
_STAGED_SHARD = re.compile(r"\.tmp-[0-9]+-[0-9a-f]{16}")
_FREED_SHARE = 0.1  # beyond what is needed: so that not every fetch has to remove something


_ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale", "class_tokens")
_OF_A_COPY = {
    *(MARKER_NAME, METADATA_NAME, MANIFEST_NAME, CLIPS_NAME, PROJECTIONS_NAME, DONE_NAME, INDEX_NAME),
    *_ARRAYS,
}


class CopyRoot:
    """The directory of all copies. Their shard files are removed, the least recently used first, and nothing else."""

    def __init__(self, path: Path | None = None, limit_nbytes: int | None = None) -> None:
        self.path = path or default_copy_root()
        make_directories(self.path)
        self.limit_nbytes = limit_nbytes or default_limit(self.path)
        self._lock = threading.Lock()
        self._since_look = self.limit_nbytes  # look at once

    def claim(self, cache_digest: str) -> Path:
        """Return the directory of a cache's copy, which is made and marked, or has been.

        Raises: CacheError where something else lies there, or the disk refuses.
        """
        path = self.path / cache_digest[:_DIGITS]
        check_no_links(self.path, path)
        make_directories(path)
        if _is_copy(path):
            return path
        # Copies of older versions have no marker, but nothing else either: a cache that was put here has.
        foreign = sorted(
            name for name in os.listdir(path) if name not in _OF_A_COPY and not _STAGED.match(name)
        )
        if foreign:
            raise CacheError(
                f"{path}: holds {foreign[0]!r}, so it is no copy of a remote cache; move it away, or set {ROOT_VARIABLE} "
                "to an empty directory"
            )
        write_in_copy(path / MARKER_NAME, canonical_json({"cache_digest": cache_digest}))
        return path

    def kept(self, cache_digest: str) -> Path | None:
        """Return the directory of a cache's copy; None where there is none."""
        path = self.path / cache_digest[:_DIGITS]
        return path if not path.is_symlink() and _is_copy(path) else None

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
                with contextlib.suppress(
                    OSError, CacheError
                ):  # another process was faster; a link was put there
                    check_no_links(self.path, path)
                    path.unlink()
                    free -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield (last use, bytes on the disk, path) of every shard file of every copy."""
        with os.scandir(self.path) as entries:
            copies = [
                Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) and _is_copy(Path(e.path))
            ]
        for path in (path for copy in copies for path in _shard_files(copy)):
            with contextlib.suppress(OSError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    yield found.st_mtime, found.st_blocks * 512, path


def write_in_copy(path: Path, content: bytes) -> None:
    """Write a small file of a copy, whole or not at all; several processes may do so at once."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _is_copy(path: Path) -> bool:
    """Whether a directory is a copy that this package made: by its name, and by the marker in it."""
    if not _COPY_NAME.fullmatch(path.name):
        return False
    with contextlib.suppress(OSError, CacheError):
        marker = _MARKER.fullmatch(read_limited(path / MARKER_NAME, 1000))
        return marker is not None and marker[1].decode().startswith(path.name)
    return False


def _shard_files(copy: Path) -> Iterator[Path]:
    """Yield the paths of a copy's shard files, and of those on their way, by the names that its description gives."""
    with contextlib.suppress(CacheError):
        spec = read_description(copy).spec
        for layout in array_layouts(spec).values():
            with contextlib.suppress(OSError, CacheError):
                check_no_links(copy, layout.blocks_directory(copy))
                shards = {layout.shard(copy, b) for b in layout.blocks_there(copy) if b < spec.num_blocks}
                for directory in {layout.shard(copy, 0).parent, *(shard.parent for shard in shards)}:
                    with contextlib.suppress(OSError):  # of the first block there may be none
                        for path in (directory / name for name in os.listdir(directory)):
                            if path in shards or _STAGED_SHARD.fullmatch(path.name):
                                yield path


def default_copy_root() -> Path:
    """Return where copies lie, as the environment says. Raises: UsageError where it does not, and there is no home directory."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "evl-cache"
    try:
        return Path.home() / ".cache" / "evl-cache"
    except RuntimeError as error:
        raise UsageError(
            f"this user has no home directory for copies of remote caches; set {ROOT_VARIABLE} to a directory for them, or HOME"
        ) from error


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
