"""Heads that read cached features, by their names on the command line."""

import re
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.heads.attentive import AttentiveHead
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.heads.decoder.workspace import Workspace
from evl_cache.heads.dropout import Dropout, SampleMasks, sample_keys
from evl_cache.heads.head import MODULES, Head, Maps, Tokens
from evl_cache.heads.ladder import LadderHead
from evl_cache.heads.layer_tokens import LayerTokens, decoded_maps
from evl_cache.heads.linear import LinearHead
from evl_cache.heads.meanpool import MeanPoolHead
from evl_cache.heads.mlap import MLAPHead
from evl_cache.heads.uniformerv2 import UniFormerV2Head
from evl_cache.notation import layers_of

# A new head is one file and one line here: docs/heads.md. A name that ends in N takes a number, the layers it reads.
HEADS: dict[str, type[Head]] = {
    "decoderN": EVLHead,
    "linear": LinearHead,
    "meanpool": MeanPoolHead,
    "attentive": AttentiveHead,
    "mlap": MLAPHead,
    "uniformerv2": UniFormerV2Head,
    "ladder": LadderHead,
}


def head_class(name: str) -> type[Head]:
    """Return the class of a head. Raises: UsageError for an unknown name."""
    return HEADS[_entry(name)[0]]


def head_depth(name: str) -> int | None:
    """Return how many layers a head reads unless `--head-layers` says so; None means all that are cached.

    Raises: UsageError for an unknown head.
    """
    _, number = _entry(name)
    return number or head_class(name).default_depth


def has_module(name: str, module: str) -> bool:
    """Whether a head has this one of `MODULES`. Raises: UsageError for an unknown head."""
    return module in head_class(name).temporal_modules


def head_layers(name: str, cached: tuple[int, ...], wanted: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return the layers that a head reads: `wanted`, or the last ones that are cached.

    Args:
        name: the head's; the number in it, or else its class, says how many of the last layers it reads.
        cached: layers of the cache, shallow to deep.
        wanted: layers that the user named.

    Raises: UsageError for an unknown head, or for layers that are not cached or do not fit its depth.
    """
    _, number = _entry(name)
    kind, depth = head_class(name), head_depth(name)
    if wanted is None:
        if number is not None and number > len(cached):
            raise UsageError(
                f"{name} reads {number} layers, the cache has {len(cached)} {list(cached)}; "
                f"use {name.removesuffix(str(number))}{len(cached)}, or extract more --layers"
            )
        return cached if depth is None else cached[-depth:]
    wanted = layers_of(wanted)
    missing = [layer for layer in wanted if layer not in cached]
    if missing:
        raise UsageError(
            f"--head-layers {list(wanted)}: {missing} are not cached; choose among {list(cached)}, or extract those --layers"
        )
    is_fixed = number is not None or not kind.takes_other_depths
    if is_fixed and len(wanted) != depth:
        raise UsageError(f"{name} reads {depth} layers, --head-layers names {len(wanted)}; make them equal")
    return wanted


def build_head(name: str, **config: Any) -> Head:
    """Return a new head.

    Args:
        name: a key of `HEADS`, with a number in place of N.
        config: what the head's class takes; `num_layers` may be left out where the name has a number.

    Raises: UsageError for an unknown head, or where the number in the name is not `num_layers`.
    """
    _, number = _entry(name)
    if number is not None and config.get("num_layers", number) != number:
        raise UsageError(
            f"{name} reads {number} layers, num_layers is {config['num_layers']}; make them equal"
        )
    return head_class(name)(**({} if number is None else {"num_layers": number}) | config)


def _entry(name: str) -> tuple[str, int | None]:
    """Return the key of `HEADS`, and the number in the name or None."""
    if name in HEADS and not name.endswith("N"):
        return name, None
    match = re.fullmatch(r"(.*?)([1-9]\d*)", name)
    if match is None or f"{match[1]}N" not in HEADS:
        raise UsageError(
            f"unknown head {name!r}; expected one of {', '.join(HEADS)}, with a number for N, such as decoder4"
        )
    return f"{match[1]}N", int(match[2])
