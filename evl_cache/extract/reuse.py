"""Rows of an older cache, copied for clips whose features and video files are the same."""

from dataclasses import replace
from pathlib import Path

from evl_cache.errors import UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store import ClipRecord, FeatureCache, Row, valid_mark


class ReusableRows:
    """Finds rows of a cache by the digest of their video file.

    Args:
        cache_path: the older cache.
        spec: of the new one.

    Raises: UsageError naming both sides where features or layers differ; CacheError where it cannot be read.
    """

    def __init__(self, cache_path: Path, spec: CacheSpec) -> None:
        self._cache = FeatureCache(cache_path)
        theirs = self._cache.spec
        if theirs.feature_id != spec.feature_id or not set(spec.stored_layers) <= set(theirs.stored_layers):
            features = [d for d in spec.differences(theirs) if d.split(":")[0] not in _NOT_FEATURES]
            raise UsageError(
                f"--reuse {cache_path}: its features are not those asked for ({'; '.join(features[:6])})"
            )
        self._positions = [theirs.stored_layers.index(layer) for layer in spec.stored_layers]
        self._found: dict[tuple[str, str], tuple[int, ClipRecord]] = {}
        for block in range(theirs.num_blocks):
            mark = valid_mark(cache_path, theirs, block)
            for row, clip in zip(theirs.clips_of_block(block), mark.clips if mark else (), strict=False):
                if clip.error is None and clip.source_sha256 is not None:
                    self._found[self._key(clip.id, clip.source_sha256)] = row, clip

    def has(self, clip_id: str, sha256: str) -> bool:
        """Whether there are rows of a clip whose file has this sha256."""
        return self._key(clip_id, sha256) in self._found

    def _key(self, clip_id: str, sha256: str) -> tuple[str, str]:
        # Augmented views are drawn from the clip's id; other features follow from the file alone.
        return clip_id if self._cache.spec.views.train_views else "", sha256

    def fetch(self, record: ClipRecord) -> tuple[ClipRecord, list[Row]]:
        """The clip's record under its new id, and a row for each of its samples.

        Raises: CacheDamaged where the older cache's bytes are not what its marks promise.
        """
        assert record.source_sha256 is not None
        row, found = self._found[self._key(record.id, record.source_sha256)]
        views = self._cache.spec.views.per_clip
        rows = [self._cache.read_row(sample) for sample in range(row * views, (row + 1) * views)]
        kept = [{name: array[self._positions] for name, array in stored.items()} for stored in rows]
        return replace(found, id=record.id), list(kept)


_NOT_FEATURES = ("content_id", "num_clips", "classes", "block_clips", "codec", "feature_id")
