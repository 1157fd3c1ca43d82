"""Clips whose frames an older rule chose, and may have chosen wrongly: their videos' packets tell which.

A clip that is not doubtful has the frames that the rule of today chooses, so its mark may say that it is of this rule.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from evl_cache.clips import Clip
from evl_cache.errors import ClipError
from evl_cache.extract.redo import rows_by_block
from evl_cache.extract.sources import SourceCheck, few
from evl_cache.spec import FRAME_RULE, CacheSpec
from evl_cache.store import (
    LOCKS_NAME,
    UNKNOWN_DECODER,
    BlockLost,
    ClipRecord,
    LockWatcher,
    is_in_redo,
    replace_records,
    valid_mark,
    valid_marks,
)

# Why the frames that older versions took of a file with a decoder may be others; None where they are the same.
Doubt = Callable[[Path, str], str | None]


@dataclass(frozen=True, kw_only=True)
class DoubtCheck:
    """What became of the clips of a cache whose frames an older rule chose.

    Attributes:
        doubtful: clips that may have other frames than they claim, and why, by the clip's row.
        cleared: rows of clips that have the frames that the rule of today chooses.
        untold: clips of which it cannot be told, as their mark does not say what video they are of, by row.
    """

    doubtful: dict[int, str] = field(default_factory=dict)
    cleared: frozenset[int] = frozenset()
    untold: dict[int, str] = field(default_factory=dict)

    @property
    def told_of_untold(self) -> str | None:
        """What a user is told of clips that cannot be examined."""
        if not self.untold:
            return None
        return (
            f"{len(self.untold)} clips cannot be examined for their frames ({few(list(self.untold.values()))}); extract "
            "them into a new cache to be sure"
        )


def has_older_frames(cache_path: Path, spec: CacheSpec) -> bool:
    """Whether a cache has clips whose frames an older rule chose."""
    return spec.by_older_rule and next(_older_clips(cache_path, spec), None) is not None


def check_doubts(
    cache_path: Path,
    spec: CacheSpec,
    clips: Sequence[Clip],
    root: Path,
    *,
    sources: SourceCheck,
    doubt: Doubt,
    threads: int,
) -> DoubtCheck:
    """Read the packets of the videos of all clips whose frames an older rule chose.

    Args:
        root: folder of the videos.
        sources: of the same cache, proved; videos that are not there or others now are left out.
        doubt: tells of one file; called from threads.

    Raises: Outage where a video cannot be read, and is not to blame.
    """
    if not spec.by_older_rule:
        return DoubtCheck()
    unknown = sources.changed.keys() | sources.unproved.keys()
    older = [(row, record) for row, record in _older_clips(cache_path, spec) if row not in unknown]
    asked = [(row, record) for row, record in older if record.source_sha256 is not None]
    untold = {row: f"{record.id}: its mark does not say what video it is of" for row, record in older}

    def reason(found: tuple[int, ClipRecord]) -> str | None:
        row, record = found
        return why_doubted(doubt, root / clips[row].path, record)

    with ThreadPoolExecutor(threads, thread_name_prefix="doubt") as pool:
        reasons = dict(zip((row for row, _ in asked), pool.map(reason, asked), strict=True))
    return DoubtCheck(
        doubtful={row: f"{clips[row].id}: {told}" for row, told in reasons.items() if told is not None},
        cleared=frozenset(row for row, told in reasons.items() if told is None),
        untold={row: told for row, told in untold.items() if row not in reasons},
    )


def why_doubted(doubt: Doubt, path: Path, record: ClipRecord) -> str | None:
    """Return why a clip's frames may be others than its record says; None where they are those. Raises: Outage."""
    try:
        return doubt(path, record.decoder or UNKNOWN_DECODER)
    except ClipError as error:  # a file that cannot be looked into proves nothing
        return f"its packets cannot be read ({error})"


def record_cleared(cache_path: Path, spec: CacheSpec, rows: frozenset[int], *, lock_expiry_s: float) -> None:
    """Write into their marks that clips are of the rule of today; their features stay as they are.

    Blocks that are damaged, or that a killed job left halfway, are passed over: their clips are examined another time.

    Raises: CacheError where the disk refuses.
    """
    locks = LockWatcher(cache_path / LOCKS_NAME, expiry_s=lock_expiry_s)
    for block, cleared in sorted(rows_by_block(spec, rows).items()):
        with locks.wait_for(f"{block:06d}") as lock:
            mark = valid_mark(cache_path, spec, block)
            if mark is None or is_in_redo(cache_path, block):
                continue
            clips = tuple(
                replace(clip, frame_rule=FRAME_RULE) if row in cleared and clip.error is None else clip
                for row, clip in zip(spec.clips_of_block(block), mark.clips, strict=True)
            )
            if clips != mark.clips:
                with contextlib.suppress(BlockLost):
                    replace_records(cache_path, spec, mark, clips, lock=lock)


def _older_clips(cache_path: Path, spec: CacheSpec) -> Iterator[tuple[int, ClipRecord]]:
    for mark in valid_marks(cache_path, spec):
        for row, record in zip(spec.clips_of_block(mark.block), mark.clips, strict=True):
            if record.is_by_older_rule(spec):
                yield row, record
