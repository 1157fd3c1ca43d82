"""What every family of image towers answers alike, and which family a tower belongs to.

S samples (clips times frames), P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from evl_cache.attention_maps import MapProjection

# Called as each block attends: block number, queries and keys of its patches, (S, P, H, D) each.
KeepQueriesKeys = Callable[[int, torch.Tensor, torch.Tensor], None]


class TowerAdapter(Protocol):
    """A frozen tower whose blocks are numbered from 1.

    Attributes:
        image_size, patch_size: (height, width) in pixels. width: C. num_blocks, num_heads: of the transformer.
        class_token: `own`, or `mean` where the tower has none and the mean of a frame's patches stands in its place.
        registers: tokens beside class token and patches, which are left out.
        dtype: of the weights.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    width: int
    num_blocks: int
    num_heads: int
    class_token: str
    registers: int

    @property
    def dtype(self) -> torch.dtype: ...

    def tokens(
        self, frames: torch.Tensor, layers: Sequence[int], keep: KeepQueriesKeys | None
    ) -> dict[int, torch.Tensor]:
        """Block -> (S, 1+P, C), as they leave the block; nothing runs after the last one asked for.

        Args:
            frames: (S, 3, height, width). layers: sorted. keep: called for those layers, in their order.
        """
        ...

    def projection(self, layer: int, compute_dtype: torch.dtype) -> MapProjection:
        """What makes the block's queries and keys from the tokens below it, on the CPU.

        Raises: UsageError where a norm and a matrix are not all that makes them.
        """
        ...
