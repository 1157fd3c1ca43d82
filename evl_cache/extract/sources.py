"""Videos that are others now than those the features of a cache were made of.

Marks hold the size and sha256 of each video. Sizes and times cost one look at each folder; a file that is newer than
its features is hashed. Only hashes of all videos prove that they are the same.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import CacheError
from evl_cache.spec import CacheSpec
from evl_cache.store import ClipRecord, KnownBlocks, clip_records, file_digest, mark_path

_THREADS = 8
# Files copied anew are all newer than their features: so many are hashed unasked, and no whole data set.
_MOST_HASHED = 100


@dataclass(frozen=True, kw_only=True)
class SourceCheck:
    """What became of the videos of clips that have features.

    Attributes:
        changed: what differs, by the clip's row in the cache; the same of all segments of a video.
        unproved: clips whose video may be another (it is newer than the features, or cannot be read), by row.
    """

    changed: dict[int, str]
    unproved: dict[int, str]

    @property
    def told_of_changed(self) -> str | None:
        """What a user is told of videos that were replaced."""
        if not self.changed:
            return None
        videos = list(dict.fromkeys(self.changed.values()))
        return (
            f"{len(videos)} videos are not those that the features were made of "
            f"({few(videos)}); extract these again with --check-sources, or put the old ones back"
        )

    @property
    def told_of_unproved(self) -> str | None:
        """What a user is told of videos that may have been replaced."""
        if not self.unproved:
            return None
        videos = list(dict.fromkeys(self.unproved.values()))
        return (
            f"{len(videos)} videos may have been replaced ({few(videos)}); bring back those "
            "that are not there, and compare the bytes of all with --check-sources"
        )


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A clip that has features."""

    row: int
    record: ClipRecord
    path: str
    is_segment: bool
    marked_ns: int

    @property
    def named(self) -> str:
        """The clip and its video; the video alone where that holds other clips, too."""
        return self.path if self.is_segment else f"{self.record.id}: {self.path}"


def check_sources(
    cache_path: Path, spec: CacheSpec, clips: Sequence[Clip], root: Path, *, prove: bool
) -> SourceCheck:
    """Compare the videos of all clips that have features with what their marks say.

    Args:
        root: folder of the videos.
        prove: hash them all. Else sizes and times decide, and videos that are not there are let pass: a cache is
            often used where they are not.
    """
    changed: dict[int, str] = {}
    to_hash: list[_Made] = []
    unproved: dict[int, str] = {}
    sizes = _FileLooks()
    for made in _clips_made(cache_path, spec, clips, root):
        look = sizes.of(made.path)
        if look is None:
            if prove:
                unproved[made.row] = f"{made.named} is not there"
            continue
        size, modified_ns = look
        if size != made.record.source_bytes:
            changed[made.row] = f"{made.path} has {size} bytes, {made.record.source_bytes} then"
        elif prove or modified_ns > made.marked_ns:
            to_hash.append(made)
    paths = list(dict.fromkeys(made.path for made in to_hash))  # of many segments one file
    if not prove and len(paths) > _MOST_HASHED:
        newer = {made.row: f"{made.named} is newer than its features" for made in to_hash}
        return SourceCheck(changed=changed, unproved=newer)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as threads:
        digests = dict(zip(paths, threads.map(_sha256, paths), strict=True))
        for made in to_hash:
            sha256 = digests[made.path]
            if sha256 is None:
                unproved[made.row] = f"{made.named} cannot be read"
            elif sha256 != made.record.source_sha256:
                changed[made.row] = f"{made.path} holds other bytes than then"
    return SourceCheck(changed=changed, unproved=unproved)


def _clips_made(cache_path: Path, spec: CacheSpec, clips: Sequence[Clip], root: Path) -> Iterator[_Made]:
    for found in KnownBlocks(cache_path, spec).all():
        marked_ns = mark_path(cache_path, found.block).stat().st_mtime_ns
        records = clip_records(found, spec, clips)
        for row, record in zip(spec.clips_of_block(found.block), records, strict=True):
            if record.error is None and record.source_sha256 is not None:
                clip = clips[row]
                yield _Made(
                    row=row,
                    record=record,
                    path=os.path.join(root, clip.path),
                    is_segment=clip.segment is not None,
                    marked_ns=marked_ns,
                )


class _FileLooks:
    """Size and time of files; each folder is listed once, as a request for each file is slow on network disks."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, os.DirEntry[str]]] = {}

    def of(self, path: str) -> tuple[int, int] | None:
        """Bytes and time of the last change, in ns; None where the file is not there, or cannot be looked at."""
        folder, name = os.path.split(path)
        try:
            if folder not in self._folders:
                self._folders[folder] = {}  # one look at a folder that is not there, too
                with os.scandir(folder) as entries:
                    self._folders[folder] = {entry.name: entry for entry in entries}
            found = self._folders[folder][name].stat()
        except (OSError, KeyError):
            return None
        return found.st_size, found.st_mtime_ns


def _sha256(path: str) -> str | None:
    try:
        return file_digest(Path(path).resolve())[1]
    except (OSError, CacheError):
        return None


def few(what: Sequence[str], *, most: int = 3) -> str:
    """Return the first few of what there is, for people."""
    return "; ".join(what[:most]) + ("; …" if len(what) > most else "")
