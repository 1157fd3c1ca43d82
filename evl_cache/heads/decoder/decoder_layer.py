"""One EVL decoder layer: its parameters, and its forward pass by `fast_attention`.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P, C channels, H heads, D head width, E = H D.
Source: sections 3.2 and 3.3 of arXiv 2208.03550.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from evl_cache.heads.decoder.fast_attention import attend, setting_for
from evl_cache.heads.decoder.products import without_autocast
from evl_cache.heads.decoder.tensors import Setting, SharedTensors, StoredMaps, StoredTokens
from evl_cache.heads.decoder.workspace import Workspace
from evl_cache.heads.dropout import Dropout


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP and of the published decoder."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerParameters(nn.Module):
    """The parameters of a decoder layer and how they are initialised; a run's `head.safetensors` has their names.

    Args:
        config: the `config` of an `EVLHead`, which has checked it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, qkv_width, frames = config["width"], config["qkv_width"], config["num_frames"]
        self.num_heads, self.num_frames = config["num_heads"], frames
        self.grid = config["grid"]
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.q_proj = nn.Linear(width, qkv_width)
        self.k_proj = nn.Linear(width, qkv_width)
        self.v_proj = nn.Linear(width, qkv_width)
        self.out_proj = nn.Linear(qkv_width, width)
        self.fc1 = nn.Linear(width, config["mlp_width"])
        self.fc2 = nn.Linear(config["mlp_width"], width)
        self.mlp_dropout = Dropout(config["dropout"])
        self.activation = QuickGELU()
        if config["temporal_conv"]:
            self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1, groups=width)
        if config["temporal_pos_embed"]:
            self.pos_embed = nn.Parameter(torch.zeros(frames, width))
        if config["temporal_cross_attention"]:
            rows = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1)
            self.motion_prev = nn.Parameter(torch.zeros(rows, width))
            self.motion_next = nn.Parameter(torch.zeros(rows, width))
        self._initialise()

    def _initialise(self) -> None:
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            if (
                not linear.bias.is_meta
            ):  # there is nothing to fill, and to see that, torch loads its compiler, for seconds
                nn.init.normal_(linear.bias, std=1e-6)


class DecoderLayer(LayerParameters):
    """`y = tokens + conv + pos + motion; x = x + attn(LN1 x, LN3 y, LN3 y); x = x + mlp(LN2 x)`."""

    def forward(
        self,
        x: torch.Tensor,
        tokens: StoredTokens,
        maps: StoredMaps | None,
        enabled: Mapping[str, bool],
        workspace: Workspace,
    ) -> torch.Tensor:
        """Return the next class query, (B, C).

        Args:
            x: class query (B, C).
            tokens: tokens of B clips.
            maps: maps of B clips; None adds no motion.
            enabled: whether each temporal module is on, by name.
            workspace: where large memory comes from.
        """
        setting = setting_for(self.k_proj.weight, grid=self.grid, epsilon=self.norm3.eps, workspace=workspace)
        shared = self._shared(enabled, setting.sums, with_motion=maps is not None)
        x = x + self.out_proj(self._attention(self.norm1(x), tokens, maps, shared, setting))
        result: torch.Tensor = x + self.fc2(self.mlp_dropout(self.activation(self.fc1(self.norm2(x)))))
        return result

    def _attention(
        self,
        x: torch.Tensor,
        tokens: StoredTokens,
        maps: StoredMaps | None,
        shared: SharedTensors,
        setting: Setting,
    ) -> torch.Tensor:
        """Return the attention heads' outputs (B, E) for the normalised class query x (B, C).

        Keys and values are never projected. Instead, the query is multiplied by the key projection and the norm's gain,
        and the tokens' weighted mean by the norm's gain and the value projection.
        """
        by_head = (self.num_heads, -1, x.shape[-1])  # (H,D,C)
        # In the parameters' dtype under autocast too: rounded queries would err more than all the rest of a weight, and one
        # row a clip costs nothing.
        with without_autocast(x.device):
            x = x.to(self.q_proj.weight.dtype)
            query = self.q_proj(x).unflatten(-1, (self.num_heads, -1))  # (B,H,D)
            carried = torch.einsum("bhd,hdc->bhc", query, self.k_proj.weight.view(by_head))
            # The key bias moves all logits of a head alike, so nothing depends on it: its gradient is zero.
            carried = carried + 0 * self.k_proj.bias.sum()
            carried = carried * self.norm3.weight * query.shape[-1] ** -0.5
        mean = attend(carried, tokens, maps, shared, setting)  # (B,H,C)
        mean = (mean * self.norm3.weight + self.norm3.bias).to(self.v_proj.weight.dtype)
        values = torch.einsum("bhc,hdc->bhd", mean, self.v_proj.weight.view(by_head))
        return values.flatten(1) + self.v_proj.bias

    def _shared(self, enabled: Mapping[str, bool], sums: torch.dtype, *, with_motion: bool) -> SharedTensors:
        """Return what the enabled temporal modules add to tokens, in the dtype of sums."""
        taps: torch.Tensor | None = None
        shift: torch.Tensor | None = None
        tables: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if enabled["temporal_pos_embed"]:
            shift = self.pos_embed.to(sums)  # (T,C)
        if enabled["temporal_conv"]:
            taps = self.conv.weight[:, 0].t().to(sums).contiguous()  # (3,C)
            assert self.conv.bias is not None
            bias = self.conv.bias.to(sums).expand(self.num_frames, -1)
            shift = bias if shift is None else shift + bias
        if enabled["temporal_cross_attention"] and with_motion:
            tables = (self.motion_prev.flip(0).to(sums), self.motion_next.flip(0).to(sums))
        return SharedTensors(taps, shift, *tables)
