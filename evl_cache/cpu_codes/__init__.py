"""Codes of tokens and maps on a CPU, by compiled loops that read features as few times as can be."""

from evl_cache.cpu_codes.encoding import (
    INT8_MIN,
    SMALLEST_TYPICAL_SHARE,
    STEPS,
    TINY,
    MapRows,
    TokenItem,
    encode,
    float16_at_least,
    for_each,
    inverse_or_zero,
    is_compiled,
    outlier_scale,
)

__all__ = [
    "INT8_MIN",
    "SMALLEST_TYPICAL_SHARE",
    "STEPS",
    "TINY",
    "MapRows",
    "TokenItem",
    "encode",
    "float16_at_least",
    "for_each",
    "inverse_or_zero",
    "is_compiled",
    "outlier_scale",
]
