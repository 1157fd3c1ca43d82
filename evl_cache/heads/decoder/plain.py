"""The EVL head as the paper writes it: the slow twin of `EVLHead`, for tests, benchmarks and pictures of attention.

It projects every key and value, makes the third norm as a tensor, and gathers motion from its table by index.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P, C channels, H heads, D head width, E = H D.
Source: sections 3.2 and 3.3 of arXiv 2208.03550.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evl_cache.heads.decoder.decoder_layer import LayerParameters
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import MODULES
from evl_cache.heads.parts import over_frames


class PlainLayer(LayerParameters):
    """One decoder layer, with the parameters of the fast one."""

    offsets: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if config["temporal_cross_attention"]:
            self.register_buffer("offsets", relative_offsets(config["grid"]), persistent=False)

    def with_position(self, tokens: Tensor, maps: Tensor | None, enabled: Mapping[str, bool]) -> Tensor:
        """Return tokens (B, T, N, C) plus what the enabled temporal modules add."""
        y = tokens
        if enabled["temporal_conv"]:
            y = y + over_frames(tokens, self.conv)
        if enabled["temporal_pos_embed"]:
            y = y + self.pos_embed[:, None, :]
        if maps is not None:
            prev = motion(maps[:, 0], self.motion_prev, self.offsets)  # frames 1 .. T-1
            following = motion(maps[:, 1], self.motion_next, self.offsets)  # frames 0 .. T-2
            # One class token row above the patches, and the frame that has no neighbour: zero.
            y = y + F.pad(prev, (0, 0, 1, 0, 1, 0)) + F.pad(following, (0, 0, 1, 0, 0, 1))
        return y

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the next class query (B, C) from the query `x` (B, C) and tokens with position `y` (B, T, N, C)."""
        memory = self.norm3(y).flatten(1, 2)  # (B,T*N,C)
        q, k, v = self._by_head(self.q_proj, self.norm1(x)[:, None]), *self._keys_values(memory)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B,H,1,D)
        x = x + self.out_proj(attended.reshape(len(x), -1))
        hidden = self.fc1(self.norm2(x))
        result: Tensor = x + self.fc2(self.mlp_dropout(hidden * torch.sigmoid(1.702 * hidden)))
        return result

    def attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the attention weights of `forward`, (B, H, T, N), that sum to one over T and N."""
        q = self._by_head(self.q_proj, self.norm1(x)[:, None])
        k, _ = self._keys_values(self.norm3(y).flatten(1, 2))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B,H,1,T*N)
        return torch.softmax(logits, dim=-1).view(len(x), self.num_heads, *y.shape[1:3])

    def _keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self._by_head(self.k_proj, memory), self._by_head(self.v_proj, memory)

    def _by_head(self, projection: nn.Linear, memory: Tensor) -> Tensor:
        """Return a projection of tokens (B, K, C), one for each attention head: (B, H, K, D)."""
        projected: Tensor = projection(memory)
        return projected.view(*memory.shape[:2], self.num_heads, -1).transpose(1, 2)


class PlainHead(nn.Module):
    """The twin of a given `EVLHead`, with a copy of its weights, its switches and its training mode."""

    def __init__(self, head: EVLHead) -> None:
        super().__init__()
        config: Mapping[str, Any] = head.config
        self.enabled = {name: getattr(head, name) for name in MODULES}
        self.class_query = nn.Parameter(torch.zeros(config["width"]))
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config["num_layers"]))
        self.norm = nn.LayerNorm(config["width"])
        self.dropout = Dropout(config["dropout"])
        self.classifier = nn.Linear(config["width"], config["num_classes"])
        self.to(head.class_query).train(head.training)
        self.load_state_dict(head.state_dict())

    def forward(self, tokens: Sequence[Tensor], maps: Sequence[Tensor] | None = None) -> Tensor:
        """Return logits (B, classes) from each layer's tokens (B, T, 1+P, C) and maps (B, 2, T-1, P, P)."""
        return self._logits(tokens, maps)

    @torch.no_grad()
    def attention(self, tokens: Sequence[Tensor], maps: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return each decoder layer's attention weights (B, H, T, 1+P), that sum to one over T and 1+P."""
        weights: list[Tensor] = []
        self._logits(tokens, maps, see=lambda layer, x, y: weights.append(layer.attention(x, y)))
        return weights

    def _logits(
        self,
        tokens: Sequence[Tensor],
        maps: Sequence[Tensor] | None,
        see: Callable[[PlainLayer, Tensor, Tensor], None] = lambda layer, x, y: None,
    ) -> Tensor:
        """Return logits; `see` is called with each layer, and the query and tokens that enter it."""
        use_maps = self.enabled["temporal_cross_attention"] and maps is not None and tokens[0].shape[1] > 1
        x = self.class_query.expand(tokens[0].shape[0], -1)  # (B,C)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, PlainLayer)
            y = layer.with_position(
                tokens[i], maps[i] if use_maps and maps is not None else None, self.enabled
            )
            see(layer, x, y)
            x = layer(x, y)
        logits: Tensor = self.classifier(self.dropout(self.norm(x)))
        return logits


def relative_offsets(grid: tuple[int, int]) -> Tensor:
    """Return the row of a motion table for every pair of query and key patch, int64 (P, P).

    Query (qi, qj) and key (ki, kj) use row (qi-ki+Hp-1)(2Wp-1) + (qj-kj+Wp-1).
    """
    height, width = grid
    row = torch.arange(height)[:, None] - torch.arange(height)[None, :] + height - 1  # (Hp,Hp)
    column = torch.arange(width)[:, None] - torch.arange(width)[None, :] + width - 1  # (Wp,Wp)
    rows = row[:, None, :, None] * (2 * width - 1) + column[None, :, None, :]  # (qi,qj,ki,kj)
    return rows.reshape(height * width, height * width)


def motion(maps: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """Return every patch's expected displacement vector under its attention map, (B, T-1, P, C).

    Args:
        maps: (B, T-1, P, P).
        table: displacement vectors, (rows, C).
        offsets: the row of each pair of patches, (P, P).
    """
    return torch.einsum("btqk,qkc->btqc", maps.to(table.dtype), table[offsets])
