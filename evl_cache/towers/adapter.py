"""The interface that every family of image towers has.

S samples (clips times frames), P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from evl_cache.attention_maps import MapProjection

# Called as each layer attends, with its number, and the queries and keys of its patches, (S, P, H, D) each.
KeepQueriesKeys = Callable[[int, torch.Tensor, torch.Tensor], None]


class TowerAdapter(Protocol):
    """A frozen tower whose layers are numbered from 1.

    Attributes:
        image_size: (height, width) in pixels.
        patch_size: (height, width) in pixels.
        width: channels C of its tokens.
        num_layers: layers of the transformer.
        num_heads: attention heads H of a layer.
        class_token: `own`, or `mean` where the tower has none and the mean of a frame's patches takes its place.
        registers: number of tokens beside class token and patches; they are left out.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    num_layers: int
    num_heads: int
    class_token: str
    registers: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        ...

    def tokens(
        self, frames: torch.Tensor, layers: Sequence[int], keep: KeepQueriesKeys | None
    ) -> dict[int, torch.Tensor]:
        """Return the tokens (S, 1+P, C) that leave each layer, by layer; nothing runs after the last one asked for.

        The tower may be switched to ways of computing that show queries and keys: it is a backbone's own.

        Args:
            frames: normalised, (S, 3, height, width).
            layers: numbers from 1, ascending.
            keep: called for each of these layers, in their order.
        """
        ...

    def projection(self, layer: int, compute_dtype: torch.dtype) -> MapProjection:
        """Return what computes the layer's queries and keys from the tokens below it, on the CPU.

        Raises: UsageError where more than a norm and a matrix makes them.
        """
        ...
