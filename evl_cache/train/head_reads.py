"""What the head of a training reads of a cache, and what several read together."""

from collections.abc import Sequence

import torch

from evl_cache.heads import build_head, head_layers
from evl_cache.runs import head_reads
from evl_cache.spec import CacheSpec
from evl_cache.store import Reads, TokensRead
from evl_cache.train.options import TrainOptions
from evl_cache.train.setup import head_config


def training_reads(options: TrainOptions, spec: CacheSpec) -> Reads:
    """What the head of a training reads of a cache.

    Raises: UsageError for an unknown head, or one that the cache's layers do not fit.
    """
    layers = head_layers(options.head, spec.layers, options.head_layers)
    with torch.device("meta"):  # asked what it reads, and no more
        head = build_head(options.head, **head_config(spec, options, layers))
    return head_reads(head, layers)


def all_reads(reads: Sequence[Reads]) -> Reads:
    """What several heads read together: every layer that one of them reads, with maps if one reads maps."""
    kinds = {r.tokens for r in reads}
    tokens: TokensRead = reads[0].tokens if len(kinds) == 1 else "both"
    return Reads(
        layers=tuple(sorted({layer for r in reads for layer in r.layers})),
        with_maps=any(r.with_maps for r in reads),
        tokens=tokens,
    )
