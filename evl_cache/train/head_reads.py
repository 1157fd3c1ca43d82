"""What a head reads of a cache: blocks, which tokens of a frame, and whether maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.heads import has_module, head_class, head_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache, TokensRead
from evl_cache.train.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class HeadReads:
    """layers: blocks, shallow to deep. with_maps: their maps too. tokens: of a frame, as `FeatureCache.buffers`."""

    layers: tuple[int, ...]
    with_maps: bool
    tokens: TokensRead

    @property
    def arguments(self) -> dict[str, Any]:
        """As a `FeatureLoader` and a `FeatureCache` take them."""
        return {"layers": self.layers, "with_maps": self.with_maps, "tokens": self.tokens}


def head_reads(options: TrainOptions, cache: FeatureCache) -> HeadReads:
    """What the head of a training reads.

    Raises: UsageError for an unknown head, or where the cache does not hold what it reads.
    """
    layers = head_layers(options.head, cache.spec.layers, options.head_layers)
    with_maps = needs_maps(options, cache.spec)
    if with_maps and not cache.spec.has_maps:
        raise UsageError(
            f"{cache.place} holds no attention maps, which temporal cross attention reads; "
            "use --no-temporal-cross-attention, or extract with --maps"
        )
    tokens: TokensRead = "class" if head_class(options.head).class_tokens_only else "all"
    return HeadReads(layers=layers, with_maps=with_maps, tokens=tokens)


def needs_maps(options: TrainOptions, spec: CacheSpec) -> bool:
    """Whether the head reads adjacent-frame maps."""
    has = has_module(options.head, "temporal_cross_attention")
    return has and options.temporal_cross_attention and spec.views.frames > 1


def all_reads(reads: Sequence[HeadReads]) -> HeadReads:
    """What several heads read together: every block that one of them reads, with maps where one reads maps."""
    kinds = {r.tokens for r in reads}
    tokens: TokensRead = reads[0].tokens if len(kinds) == 1 else "both"
    return HeadReads(
        layers=tuple(sorted({layer for r in reads for layer in r.layers})),
        with_maps=any(r.with_maps for r in reads),
        tokens=tokens,
    )
