"""Deprecated names of `evl_cache.runs`: they work until version 0.3."""

import warnings

from evl_cache.runs import head_logits

__all__ = ["head_logits"]

warnings.warn(
    "evl_cache.scoring is deprecated and goes in evl-cache 0.3; import from evl_cache.runs",
    DeprecationWarning,
    stacklevel=2,
)
