"""The frozen image tower: unpooled tokens of several blocks and the maps made from their queries and keys.

B clips, T frames, P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from evl_cache.attention_maps import MapProjection, adjacent_frame_maps
from evl_cache.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a backbone gives of a batch of clips, by block number (counted from 1).

    Attributes:
        tokens: block -> (B, T, 1+P, C), class token first.
        maps: block -> (B, 2, T-1, P, P); empty for a single frame, or where maps were not asked for.
    """

    tokens: dict[int, torch.Tensor]
    maps: dict[int, torch.Tensor]


class Backbone(nn.Module):
    """An open_clip `VisionTransformer`, frozen, in eval mode, cut after the last block needed.

    Args:
        visual: the tower.
        layers: blocks to keep, counted from 1.
        with_maps: also make the adjacent-frame maps of those blocks.

    Raises: UsageError for a tower that is no such transformer, or layers out of its range.
    """

    def __init__(self, visual: nn.Module, layers: Sequence[int], *, with_maps: bool = True) -> None:
        super().__init__()
        check_tower(visual)
        blocks: Any = visual.transformer.resblocks  # type: ignore[union-attr]
        self.layers = check_layers(layers, len(blocks))
        self.visual = visual.eval().requires_grad_(False)
        self.with_maps = with_maps

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: torch.Tensor) -> Features:
        """Tokens and maps of normalised frames.

        Args:
            frames: float (B, T, 3, S, S), normalised with the tower's mean and std, on its device.

        Raises: UsageError for another shape.
        """
        size = tuple(self.visual.image_size)  # type: ignore[arg-type]
        if frames.ndim != 5 or frames.shape[2] != 3 or tuple(frames.shape[-2:]) != size:
            raise UsageError(
                f"frames are {tuple(frames.shape)}; this tower expects (B, T, 3, {size[0]}, {size[1]})"
            )
        batch, num_frames = frames.shape[:2]
        visual: Any = self.visual
        x = visual._embeds(frames.flatten(0, 1).to(visual.conv1.weight.dtype))  # (B*T,N,C)
        features = Features(tokens={}, maps={})
        for number in range(1, max(self.layers) + 1):
            x, q, k = _block_forward(visual.transformer.resblocks[number - 1], x)
            if number not in self.layers:
                continue
            features.tokens[number] = x.view(batch, num_frames, *x.shape[1:])
            if self.with_maps and num_frames > 1:
                features.maps[number] = adjacent_frame_maps(
                    q.view(batch, num_frames, *q.shape[1:]), k.view(batch, num_frames, *k.shape[1:])
                )
        return features


def _block_forward(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One frozen block, with its queries and keys at no extra cost. x (N, L, C); q, k (N, L, H, D)."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(*qkv.shape[:2], 3, attn.num_heads, -1).unbind(2)
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + block.ls_1(attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x))), q, k


def map_projections(
    visual: nn.Module, layers: Sequence[int], *, compute_dtype: torch.dtype
) -> dict[int, MapProjection]:
    """What makes the maps of some blocks from the tokens below them, on the CPU.

    The projection is rounded to `compute_dtype`, with which the tower ran, and then to float16, which costs
    less than int8 tokens do by far; the rest is float32. The same for a tower that was moved to
    `compute_dtype` before.

    Raises: UsageError for a tower that is no such transformer, or layers out of its range.
    """
    check_tower(visual)
    blocks: Any = visual.transformer.resblocks  # type: ignore[union-attr]

    def kept(value: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return value.detach().to("cpu", compute_dtype).to(dtype).contiguous()

    out = {}
    for number in check_layers(layers, len(blocks)):
        norm, attn = blocks[number - 1].ln_1, blocks[number - 1].attn
        rows = 2 * attn.embed_dim
        out[number] = MapProjection(
            norm_weight=kept(norm.weight),
            norm_bias=kept(norm.bias),
            norm_eps=float(norm.eps),
            weight=kept(attn.in_proj_weight[:rows], torch.float16),
            bias=kept(attn.in_proj_bias[:rows]),
            num_heads=int(attn.num_heads),
        )
    return out


def check_layers(layers: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Sorted, distinct block numbers. Raises: UsageError for none, or one outside 1 .. num_blocks."""
    out = tuple(sorted({int(layer) for layer in layers}))
    if not out or out[0] < 1 or out[-1] > num_blocks:
        raise UsageError(f"layers {list(layers)}; this tower has blocks 1 to {num_blocks}: choose among them")
    return out


def check_tower(visual: nn.Module) -> None:
    """Raises: UsageError for a tower whose blocks are not those that EVL reads."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(visual, "_embeds"):
        raise UsageError(
            f"the image tower is a {type(visual).__name__}; expected an open_clip VisionTransformer (ViT-…): "
            "ResNet, ConvNeXt and timm towers have no blocks of tokens that EVL can read"
        )
    if not all(type(block).__name__ == "ResidualAttentionBlock" for block in blocks):
        raise UsageError(
            f"the tower's blocks are {type(blocks[0]).__name__}; expected open_clip's ResidualAttentionBlock: "
            "queries and keys of custom blocks are not those of the published method"
        )
