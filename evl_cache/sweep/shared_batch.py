"""A batch's features for several heads: moved once, and every layer decoded once.

B samples.
"""

from collections.abc import Sequence
from typing import Any

import torch

from evl_cache.heads import LayerTokens, decoded_maps
from evl_cache.runs import HeadInputs
from evl_cache.store import Reads, StoredBatch


class SharedBatch:
    """A batch's features, decoded on the device; what heads make of them without parameters is made once too.

    Args:
        features: of the layers that all heads read, on the device. They must not be overwritten while this is in use.
        reads: of all heads together.
        products: the dtype that maps are multiplied in.
    """

    def __init__(self, features: StoredBatch, reads: Reads, *, products: torch.dtype) -> None:
        made: Any = features.with_made_maps()
        self._tokens = [LayerTokens(stored) for stored in made.tokens]
        for layer in self._tokens:
            layer.values  # noqa: B018  # decoded now, so that no head is charged for it
        self._maps = None if made.maps is None else [decoded_maps(m, products) for m in made.maps]
        self._class_tokens = [LayerTokens(stored) for stored in made.class_tokens or []]
        self._places = {layer: place for place, layer in enumerate(reads.layers)}

    def inputs(self, reads: Reads) -> HeadInputs:
        """What one head takes."""
        places = [self._places[layer] for layer in reads.layers]
        tokens = self._class_tokens if reads.tokens == "class" else self._tokens
        return HeadInputs(
            tokens=_at(tokens, places), maps=_at(self._maps, places) if reads.with_maps else None
        )


def _at(values: Sequence[Any] | None, places: Sequence[int]) -> list[Any]:
    assert values is not None, "a head reads what its pass reads"
    return [values[place] for place in places]
