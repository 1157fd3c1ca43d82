"""Heads that read cached features. `build_head` makes one from its name on the command line."""

import re
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.heads.evl import EVLHead

__all__ = ["EVLHead", "build_head", "head_layers"]


def head_layers(name: str, cached: tuple[int, ...], wanted: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The blocks that a head reads: `wanted`, or the last N cached ones for `decoderN`.

    Raises: UsageError for an unknown head, or layers that are not cached or do not fit its depth.
    """
    match = re.fullmatch(r"decoder([1-9]\d*)", name)
    if match is None:
        raise UsageError(f"unknown head {name!r}; expected decoderN, such as decoder4")
    depth = int(match[1])
    if wanted is None:
        if depth > len(cached):
            raise UsageError(
                f"{name} reads {depth} layers, the cache has {len(cached)} {list(cached)}; "
                f"use decoder{len(cached)}, or extract more --layers"
            )
        return cached[-depth:]
    missing = [layer for layer in wanted if layer not in cached]
    if missing:
        raise UsageError(
            f"--head-layers {list(wanted)}: {missing} are not cached; the cache has {list(cached)}"
        )
    if len(wanted) != depth:
        raise UsageError(f"{name} reads {depth} layers, --head-layers names {len(wanted)}; make them equal")
    return wanted


def build_head(name: str, **config: Any) -> EVLHead:
    """A new head. Arguments as `EVLHead`, without `num_layers`, which the name tells."""
    match = re.fullmatch(r"decoder([1-9]\d*)", name)
    assert match is not None, "head_layers has checked the name"
    return EVLHead(num_layers=int(match[1]), **config)
