"""Deprecated names of `evl_cache.batches`: they work until version 0.3."""

import warnings

from evl_cache.batches import FeatureLoader, samples_of_clips

__all__ = ["FeatureLoader", "samples_of_clips"]

warnings.warn(
    "evl_cache.dataset is deprecated and goes in evl-cache 0.3; import from evl_cache.batches",
    DeprecationWarning,
    stacklevel=2,
)
