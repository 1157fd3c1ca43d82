"""What every family of image towers answers alike, and which family a tower belongs to.

S samples (clips times frames), P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from evl_cache.attention_maps import MapProjection
from evl_cache.errors import UsageError

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


def adapter_of(visual: nn.Module) -> TowerAdapter:
    """The adapter of a tower.

    Raises: UsageError for one whose blocks have no tokens, queries and keys that EVL can read.
    """
    from evl_cache.towers.open_clip_vit import OpenClipVit
    from evl_cache.towers.timm_vit import TimmVit, timm_trunk

    if hasattr(getattr(visual, "transformer", None), "resblocks") and hasattr(visual, "_embeds"):
        return OpenClipVit(visual)
    trunk = timm_trunk(visual)
    if trunk is None:
        raise UsageError(
            f"the image tower is a {type(visual).__name__}; expected an open_clip VisionTransformer (ViT-…) or a "
            "VisionTransformer or Eva of timm (SigLIP, EVA-02, PE-Core, DINO): other towers have no blocks of tokens "
            "that EVL can read"
        )
    return TimmVit(trunk)
