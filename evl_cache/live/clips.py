"""Videos in the place of a cache: a source of samples whose features are made when they are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.canonical_json import digest
from evl_cache.clips import Clip
from evl_cache.runs import ONLINE_PREFIX
from evl_cache.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class LiveClips:
    """Videos in the place of a cache. Attributes as `FeatureCache`; `path` is the videos' root.

    `known_missing`: as `ExtractionJob`.
    """

    path: Path
    spec: CacheSpec
    clips: Sequence[Clip]
    origin: Mapping[str, Any] = field(default_factory=dict)
    known_missing: frozenset[str] = frozenset()

    @cached_property
    def sample_clips(self) -> np.ndarray:
        """The clip's row of each sample."""
        return np.repeat(np.arange(self.spec.num_clips), self.spec.views.per_clip)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each sample, int64."""
        labels = np.asarray([clip.label for clip in self.clips], dtype=np.int64)
        return labels.repeat(self.spec.views.per_clip)

    @property
    def place(self) -> str:
        """The videos' root."""
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Digest of what a cache of these features would be made from."""
        return (
            f"{ONLINE_PREFIX}{digest([self.spec.feature_id, self.spec.content_id, list(self.spec.layers)])}"
        )
