"""A narrow network beside the backbone: it reads each layer's tokens and never feeds back into it.

B clips, T frames, P patches, N = 1+P tokens of a frame, C channels of the backbone, W of the side network, L layers.
Source: Side4Video (arXiv 2311.15769): temporal convolution, class-token shift, spatial attention, MLP, at reduced
width; here on cached layers alone. DiST (arXiv 2309.07911) also puts a side network beside a frozen CLIP.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import Head
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.heads.parts import MLP, SelfAttention, normalised, over_frames, zero

REDUCTION = 4
SHIFTED = 4  # one channel in four comes from the next frame, and one in four from the frame before


class SideBlock(nn.Module):
    """`h = h + down(LN tokens); h = h + conv(h); h = h + attn(shift(LN h)); h = h + mlp(LN h)`."""

    def __init__(self, width: int, side_width: int, num_heads: int, *, temporal_conv: bool) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(width), nn.Linear(width, side_width)
        self.conv: nn.Conv1d | None = None
        if temporal_conv:
            self.conv = nn.Conv1d(side_width, side_width, kernel_size=3, padding=1, groups=side_width)
            zero(self.conv)
        self.norm1, self.norm2 = nn.LayerNorm(side_width), nn.LayerNorm(side_width)
        self.attention, self.mlp = SelfAttention(side_width, num_heads), MLP(side_width)

    def forward(self, h: Tensor | None, tokens: LayerTokens) -> Tensor:
        """Return the next h (B, T, N, W); `h` is None for the first layer."""
        read = self.down(normalised(tokens, self.norm))
        h = read if h is None else h + read
        if self.conv is not None:
            h = h + over_frames(h, self.conv)
        frames = shift_class_token(self.norm1(h)).flatten(0, 1)  # (B*T,N,W)
        h = h + self.attention(frames).view_as(h)
        result: Tensor = h + self.mlp(self.norm2(h))
        return result


def shift_class_token(h: Tensor) -> Tensor:
    """Return tokens (B, T, N, W) whose class tokens have a quarter of their channels from each neighbouring frame.

    The first quarter comes from the next frame, the second from the frame before; zeros where there is none.
    """
    fold = h.shape[-1] // SHIFTED
    token = h[:, :, 0]  # (B,T,W)
    later = nn.functional.pad(token[:, 1:, :fold], (0, 0, 0, 1))
    earlier = nn.functional.pad(token[:, :-1, fold : 2 * fold], (0, 0, 1, 0))
    shifted = torch.cat([later, earlier, token[..., 2 * fold :]], dim=-1)
    return torch.cat([shifted[:, :, None], h[:, :, 1:]], dim=2)


class LadderHead(Head):
    """The side network over all layers; its tokens are averaged for the classifier.

    Args, beside those of `Head`:
        side_width: W; about a quarter of C by default.
        temporal_conv: whether to convolve over frames.
    """

    temporal_modules = ("temporal_conv",)

    def __init__(self, *, side_width: int | None = None, temporal_conv: bool = True, **config: Any) -> None:
        super().__init__(temporal_conv=temporal_conv, **config)
        if side_width is None:
            step = SHIFTED * self.num_heads
            side_width = -(-self.width // (REDUCTION * step)) * step
        self.config["side_width"] = side_width
        self.blocks = nn.ModuleList(
            SideBlock(self.width, side_width, self.num_heads, temporal_conv=temporal_conv)
            for _ in range(self.num_layers)
        )
        self.norm = nn.LayerNorm(side_width)
        self.dropout = Dropout(self.config["dropout"])
        self.classifier = nn.Linear(side_width, self.num_classes)

    def logits(self, tokens: Sequence[LayerTokens]) -> Tensor:
        """See `Head.logits`."""
        h: Tensor | None = None
        for block, layer in zip(self.blocks, tokens, strict=True):
            h = block(h, layer)
        assert h is not None
        result: Tensor = self.classifier(self.dropout(self.norm(h).mean((1, 2))))
        return result
