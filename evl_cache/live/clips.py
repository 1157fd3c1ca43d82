"""Videos in the place of a cache: a source of samples whose features are made when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.canonical_json import digest
from evl_cache.clips import Clip, ClipList
from evl_cache.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class LiveClips:
    """Videos in the place of a cache. Attributes as `FeatureCache`; `path` is the videos' root."""

    path: Path
    spec: CacheSpec
    clips: tuple[Clip, ...]
    labels: np.ndarray
    sample_clips: np.ndarray
    origin: Mapping[str, Any]

    @classmethod
    def of(
        cls, clips: ClipList, root: Path, spec: CacheSpec, *, origin: Mapping[str, Any] | None = None
    ) -> "LiveClips":
        """A list of clips, with what is to be made of them."""
        rows = np.repeat(np.arange(spec.num_clips), spec.views.per_clip)
        labels = np.asarray([clip.label for clip in clips.clips], dtype=np.int64)
        return cls(
            path=root,
            spec=spec,
            clips=clips.clips,
            labels=labels[rows],
            sample_clips=rows,
            origin=origin or {},
        )

    @property
    def place(self) -> str:
        """The videos' root."""
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Of no cache, but of what one would be made from."""
        return f"online-{digest([self.spec.feature_id, self.spec.content_id, list(self.spec.layers)])}"
