"""The EVL decoder: one learned class query reads the unpooled tokens of several frozen layers.

B clips, T frames, P patches (grid Hp x Wp), C channels of the backbone, H heads, D head width, E = H D.
Source: sections 3.2 and 3.3 of arXiv 2208.03550.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from evl_cache.errors import UsageError
from evl_cache.heads.decoder.decoder_layer import DecoderLayer
from evl_cache.heads.decoder.tensors import stored_maps, stored_tokens
from evl_cache.heads.decoder.workspace import Workspace
from evl_cache.heads.dropout import Dropout
from evl_cache.heads.head import MODULES, Head, Maps, Tokens, check_floating, check_shape, stored_values


class _Switch:
    """Whether a temporal module, named like the attribute, is on; one that was built may be switched off and on."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, head: None, owner: type) -> "_Switch": ...
    @overload
    def __get__(self, head: "EVLHead", owner: type) -> bool: ...
    def __get__(self, head: "EVLHead | None", owner: type) -> "bool | _Switch":
        return self if head is None else head._enabled[self._name]

    def __set__(self, head: "EVLHead", on: bool) -> None:
        if on and not head.config[self._name]:
            raise UsageError(
                f"{self._name} cannot be switched on: the head was built without it; build one with {self._name}=True"
            )
        head._enabled[self._name] = bool(on)


class EVLHead(Head):
    """The transformer decoder over cached tokens, with its three temporal modules and the classifier.

    A temporal module that was built may be switched off and on again through the attribute of its name.

    Args:
        num_layers: decoder layers, one for each cached layer that it reads.
        width: channels C of the backbone's tokens.
        num_frames: frames T of a view.
        grid: patches (Hp, Wp).
        num_classes: outputs.
        num_heads: attention heads; width / 64 by default, as published.
        qkv_width: width E of queries, keys and values; `width` by default.
        mlp_width: hidden width of the MLP; 4 * `width` by default.
        dropout: probability in the MLP (after the activation) and before the classifier.
        temporal_conv: whether to build the depthwise convolution over frames.
        temporal_pos_embed: whether to build the learned position of each frame.
        temporal_cross_attention: whether to build the motion tables that read adjacent-frame maps.

    Attributes:
        workspace: where large memory comes from; heads that take turns may share one.

    Raises: UsageError where sizes contradict each other.
    """

    temporal_modules = MODULES
    temporal_conv, temporal_pos_embed, temporal_cross_attention = _Switch(), _Switch(), _Switch()

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        num_frames: int,
        grid: tuple[int, int],
        num_classes: int,
        num_heads: int | None = None,
        qkv_width: int | None = None,
        mlp_width: int | None = None,
        dropout: float = 0.5,
        temporal_conv: bool = True,
        temporal_pos_embed: bool = True,
        temporal_cross_attention: bool = True,
    ) -> None:
        qkv_width = width if qkv_width is None else qkv_width
        num_heads = max(1, qkv_width // 64) if num_heads is None else num_heads
        super().__init__(
            num_layers=num_layers,
            width=width,
            num_frames=num_frames,
            grid=grid,
            num_classes=num_classes,
            num_heads=num_heads,
            dropout=dropout,
            qkv_width=qkv_width,
            mlp_width=4 * width if mlp_width is None else mlp_width,
            temporal_conv=temporal_conv,
            temporal_pos_embed=temporal_pos_embed,
            temporal_cross_attention=temporal_cross_attention,
        )
        if qkv_width % num_heads:
            raise UsageError(
                f"{num_heads} heads do not divide the decoder's width of {qkv_width}; expected a divisor"
            )
        self._enabled = {name: bool(self.config[name]) for name in MODULES}
        self.workspace = Workspace()
        self.class_query = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(DecoderLayer(self.config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens: Sequence[Tokens], maps: Sequence[Maps] | None = None) -> Tensor:
        """Return class logits (B, num_classes) from cached features. No argument is changed.

        Tokens and maps must not be overwritten before the backward pass. Codes are never decoded as a whole.

        Args:
            tokens: one for each layer, shallow to deep, (B, T, 1+P, C), class token first, floating or 8-bit codes.
            maps: one for each layer, (B, 2, T-1, P, P), floating or 8-bit codes; may be None where the cross attention
                is off or T is 1.

        Raises: UsageError for a list or shape that is not this head's.
        """
        self.check_tokens(tokens)
        clips = stored_values(tokens[0]).shape[0]
        if self.reads_maps:
            self._check_maps(clips, maps)
        x = self.class_query.expand(clips, -1)  # (B,C)
        for i, layer in enumerate(self.layers):
            layer_maps = stored_maps(maps[i]) if self.reads_maps and maps is not None else None
            x = layer(x, stored_tokens(tokens[i]), layer_maps, self._enabled, self.workspace)
        logits: Tensor = self.classifier(self.dropout(self.norm(x)))
        return logits

    @property
    def reads_maps(self) -> bool:
        """Whether it needs adjacent-frame maps as it is set now."""
        return self.temporal_cross_attention and self.num_frames > 1

    @property
    def has_idle_parameters(self) -> bool:
        """Whether motion tables get no gradient, as with a single frame."""
        return self.temporal_cross_attention and self.num_frames == 1

    def _check_maps(self, clips: int, maps: Sequence[Maps] | None) -> None:
        if maps is None or len(maps) != len(self.layers):
            raise UsageError(
                f"got maps of {0 if maps is None else len(maps)} layers; temporal cross attention needs them "
                f"for all {len(self.layers)}: cache them (--maps), or switch it off "
                "(--no-temporal-cross-attention)"
            )
        patches = self.grid[0] * self.grid[1]
        expected = (clips, 2, self.num_frames - 1, patches, patches)
        for m in maps:
            check_shape("maps", "(B, 2, T-1, P, P)", tuple(stored_values(m).shape), expected)
            check_floating("maps", m)
