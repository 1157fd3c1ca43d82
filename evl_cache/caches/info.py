"""What a cache holds and how far it is: what `info` prints."""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evl_cache.errors import reason_alone
from evl_cache.spec import FRAME_RULE
from evl_cache.store import FeatureCache, cache_size, size_together

_ALL_BY_RULE = f"all clips by rule {FRAME_RULE}"
# Of containers in which no decoder finds a frame by its number without reading what is before it.
# fmt: off
_DOUBTFUL_ENDINGS = frozenset((
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".mjpeg", ".mjpg",
    ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nsv", ".nut", ".ogg", ".ogm", ".ogv", ".ps", ".rm", ".rmvb", ".tod",
    ".tp", ".trp", ".ts", ".vob", ".wmv", ".wtv",
))
# fmt: on


def describe(path: str | Path, *, most_marks: float = 0) -> dict[str, Any]:
    """Describe a cache as plain JSON values: spec, size, completeness, failures by reason, versions.

    Args:
        most_marks: of caches with so many blocks at most, short clips are counted, for which every mark is read; of others
            `short_clips` is None.

    `bytes` and `files` are of what describes it and of marks and shards of the blocks done, in a directory and behind a URL.

    Raises: CacheError where there is no cache; CacheDamaged where its description is not intact.
    """
    cache = FeatureCache(path)
    held = [(member.path, member.spec, member.copy) for member in cache.members]
    size = size_together(
        [
            cache_size(path, spec) if copy is None else copy.size
            for path, spec, copy in held or [(cache.path, cache.spec, cache.copy)]
        ]
    )
    done = int(cache.is_valid.reshape(-1, cache.spec.views.per_clip).all(axis=1).sum())
    return {
        "path": cache.place,
        "spec": cache.spec.to_json(),
        "stored_layers": list(cache.spec.stored_layers),
        "grid": list(cache.spec.tower.grid),
        "content_id": cache.spec.content_id,
        "bytes": size.nbytes,
        "files": size.files,
        "blocks": cache.num_blocks,
        "blocks_done": cache.num_blocks_done,
        "is_complete": cache.is_complete,
        "clips_done": done,
        "clips_failed": len(cache.failures),
        "failures_by_reason": failures_by_reason(cache),
        "failures": [{"clip": clip, "reason": reason_alone(reason, clip)} for clip, reason in cache.failures],
        "damaged_marks": list(cache.damaged_marks.values()),
        "cache_digest": cache.fingerprint,
        "additions": [member.told for member in cache.members[1:]],
        "created_with": dict(cache.description.created_with),
        "decoders": sorted({decoder for decoder, _ in cache.provenance}),
        "frames": asdict(frames_of(cache)),
        "short_clips": short_clips(cache) if cache.num_blocks <= most_marks else None,
    }


def short_clips(cache: FeatureCache) -> int | None:
    """Count clips with features whose views repeat frames, as they have fewer frames than a view lies over.

    Only marks tell it, of which all are read. Returns: None of a cache that is not on this disk.
    """
    if cache.copy is not None:
        return None
    held = (
        [(member.done.intact_mark, member.spec.num_blocks) for member in cache.members]
        if cache.members
        else [(cache.mark, cache.num_blocks)]
    )
    marks = (mark_of(block) for mark_of, num_blocks in held for block in range(num_blocks))
    short = {clip.id for mark in marks if mark is not None for clip in mark.clips if _repeats(clip.indices)}
    return len(short)


def _repeats(indices: tuple[tuple[int, ...], ...] | None) -> bool:
    """Whether a view shows a frame twice; a clip that failed has no views."""
    return any(len(set(view)) < len(view) for view in indices or ())


@dataclass(frozen=True, kw_only=True)
class FramesFound:
    """By which rules the frames of a cache's clips were chosen, as far as its marks tell.

    Attributes:
        rule: of the cache, a part of its identity.
        by_older_rule: clips with features whose frames a rule before this version's chose; the other ones have the
            frames that the rule of today chooses.
        doubtful: those of them in files of kinds in which that rule often missed the frame.
        untold: the rest of them: only their videos can tell.
    """

    rule: int
    by_older_rule: int
    doubtful: int
    untold: int

    def told(self) -> str:
        """What a person is told, without advice."""
        if not self.by_older_rule:
            newer = self.rule > FRAME_RULE
            return f"chosen by rule {self.rule}, which this version does not know" if newer else _ALL_BY_RULE
        return (
            f"of {self.by_older_rule} clips chosen by rule {self.rule}, before rule {FRAME_RULE}: {self.doubtful} doubtful "
            f"by their kind of file, {self.untold} can be told only by the videos"
        )


def frames_of(cache: FeatureCache) -> FramesFound:
    """Count the clips of a cache whose frames may be others than they claim."""
    older = cache.by_older_rule
    doubtful = sum(Path(cache.clips[row].path).suffix.lower() in _DOUBTFUL_ENDINGS for row in older)
    return FramesFound(
        rule=cache.spec.frame_rule,
        by_older_rule=len(older),
        doubtful=doubtful,
        untold=len(older) - doubtful,
    )


def failures_by_reason(cache: FeatureCache) -> dict[str, int]:
    """Count failed clips by kind of reason, most frequent first."""
    counts = Counter(_kind(*failure) for failure in cache.failures)
    return dict(counts.most_common())


def failed_clips_by_reason(cache: FeatureCache) -> dict[str, list[tuple[str, str]]]:
    """Group failed clips (id, reason without the file's name) by kind of reason, the most frequent kind first."""
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in failures_by_reason(cache)}
    for clip, reason in cache.failures:
        found[_kind(clip, reason)].append((clip, reason_alone(reason, clip)))
    return found


def _kind(clip: str, reason: str) -> str:
    """A reason without the file's name, places in it and other numbers."""
    kind = reason_alone(reason, clip)
    if kind == reason:  # the file has another name than the clip
        kind = re.sub(r"^\S.*?: ", "", reason, count=1)
    return re.sub(r"0x[0-9a-f]+|-?\d+", "#", kind)
