"""Rows of an older cache, copied for clips whose features and video files are the same.

Where an older rule chose the frames of that cache, a clip's rows are copied if its frames are those of the rule of today.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from evl_cache.clips import Clip, Segment
from evl_cache.errors import CacheError, UsageError
from evl_cache.extract.doubts import Doubt, why_doubted
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    ClipRecord,
    FeatureCache,
    GrownRecords,
    KnownBlocks,
    Row,
    cache_parts,
    clip_records,
    directory_of,
    read_clips,
)


class ReusableRows:
    """Finds rows of a cache by the digest of their video file.

    Args:
        cache_path: the older cache.
        spec: of the new one.
        doubt: tells of a file whether older versions may have taken other frames of it.

    Raises: UsageError naming both sides where features or layers differ; CacheError where it cannot be read.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec, *, doubt: Doubt) -> None:
        self._cache, self._doubt = FeatureCache(directory_of(cache_path)), doubt
        theirs = self._cache.spec
        theirs.check_frame_rule(f"--reuse {cache_path}")
        if replace(theirs, frame_rule=spec.frame_rule).feature_id != spec.feature_id or not set(
            spec.stored_layers
        ) <= set(theirs.stored_layers):
            features = [d for d in spec.differences(theirs) if d.split(":")[0] not in _NOT_FEATURES]
            raise UsageError(
                f"--reuse {cache_path}: its features are not those asked for ({'; '.join(features[:6])})"
            )
        self._positions = [theirs.stored_layers.index(layer) for layer in spec.stored_layers]
        parts = cache_parts(cache_path).parts
        self._records = GrownRecords(parts)
        self._fetched: dict[str, tuple[ClipRecord, list[dict[str, Any]]]] = {}
        self._found: dict[tuple[str, str, Segment | None], int] = {}
        for part in parts:
            if not part.starts_clips:
                continue
            clips = read_clips(part.path, part.description)
            for found in KnownBlocks(part.path, part.spec).all():
                records = clip_records(found, part.spec, clips)
                for row, record in zip(part.spec.clips_of_block(found.block), records, strict=True):
                    if record.error is None and record.source_sha256 is not None:
                        self._found[self._key(clips[row], record.source_sha256)] = part.box.clips[row]

    def fetch(self, clip: Clip, sha256: str, path: Path) -> bool:
        """Read the rows of a clip whose file, at `path`, has this sha256, to be taken.

        Returns: whether there are any that are intact, and of the frames that are asked for.
        Raises: Outage where the file cannot be read, and is not to blame.
        """
        row = self._found.get(self._key(clip, sha256))
        record = None if row is None else self._records.of(row)
        if row is None or record is None or record.source_sha256 != sha256:
            return False
        if record.is_by_older_rule(self._cache.spec) and why_doubted(self._doubt, path, record) is not None:
            return False
        views = self._cache.spec.views.per_clip
        try:
            rows = [self._cache.read_row(sample) for sample in range(row * views, (row + 1) * views)]
        except CacheError:
            return False  # the clip is extracted as if it were in no other cache
        kept = [{name: array[self._positions] for name, array in stored.items()} for stored in rows]
        self._fetched[clip.id] = replace(record, id=clip.id), kept
        return True

    def take(self, record: ClipRecord) -> tuple[ClipRecord, list[Row]]:
        """The record of a clip that was fetched, under its new id, and a row for each of its samples."""
        found, rows = self._fetched.pop(record.id)
        return found, list(rows)

    def _key(self, clip: Clip, sha256: str) -> tuple[str, str, Segment | None]:
        # Augmented views are drawn from the clip's id; other features follow from the file and the part of it alone.
        return clip.id if self._cache.spec.views.train_views else "", sha256, clip.segment


_NOT_FEATURES = (
    "content_id", "num_clips", "classes", "block_clips", "codec", "feature_id", "frame_rule", "chunk_keys",
)  # fmt: skip
