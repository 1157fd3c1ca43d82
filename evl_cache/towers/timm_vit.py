"""timm's VisionTransformer and Eva, alone or as the trunk of open_clip's TimmModel.

SigLIP and DINOv2 are VisionTransformers; EVA-02, PE-Core and DINOv3 are Evas.

S samples (clips times frames), P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from evl_cache.attention_maps import MapProjection
from evl_cache.errors import UsageError
from evl_cache.towers.adapter import KeepQueriesKeys
from evl_cache.towers.open_clip_vit import rounded_projection

_TRUNKS = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
_ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


def timm_trunk(visual: nn.Module) -> nn.Module | None:
    """Return timm's model, which is the tower or its trunk; None for another library's tower."""
    for candidate in (visual, getattr(visual, "trunk", None)):
        if isinstance(candidate, nn.Module) and type(candidate).__module__.startswith("timm."):
            return candidate
    return None


class TimmVit:
    """The adapter of timm's towers; see `TowerAdapter`.

    timm runs its own layers. Queries and keys are those that it passes to the attention, so whatever a layer does to
    them is in them: biases, norms and rotary positions.

    Raises: UsageError for a model without one sequence of tokens that attend to each other by q.k alone.
    """

    def __init__(self, trunk: nn.Module) -> None:
        model: Any = trunk
        _check(model)
        self._trunk, self._blocks = model, model.blocks
        self.image_size = _pair(model.patch_embed.img_size)
        grid = model.patch_embed.grid_size
        self.patch_size = (self.image_size[0] // grid[0], self.image_size[1] // grid[1])
        self.width, self.num_layers = int(model.embed_dim), len(self._blocks)
        self.num_heads = int(self._blocks[0].attn.num_heads)
        self.class_token = "mean" if model.cls_token is None else "own"
        self._prefix = int(model.num_prefix_tokens)
        self.registers = self._prefix - (self.class_token == "own")

    @property
    def dtype(self) -> torch.dtype:
        """See `TowerAdapter.dtype`."""
        dtype: torch.dtype = next(self._blocks.parameters()).dtype
        return dtype

    def tokens(
        self, frames: torch.Tensor, layers: Sequence[int], keep: KeepQueriesKeys | None
    ) -> dict[int, torch.Tensor]:
        """See `TowerAdapter.tokens`; timm's own function returns them, and stops after the last layer asked for."""

        def attended(number: int, q: torch.Tensor, k: torch.Tensor) -> None:
            if keep is not None and number in layers:
                keep(number, _patches_of(q, self._prefix), _patches_of(k, self._prefix))

        for block in self._blocks:
            block.attn.fused_attn = True  # by the one call that shows queries and keys
        with _Attentions(attended) as seen:
            found = self._trunk.forward_intermediates(
                frames,
                indices=[number - 1 for number in layers],
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
                return_prefix_tokens=self._prefix > 0,
            )
        assert seen.count == max(layers), f"{seen.count} attentions in {max(layers)} layers"
        return {number: self._with_class_token(tokens) for number, tokens in zip(layers, found, strict=True)}

    def _with_class_token(self, tokens: Any) -> torch.Tensor:
        patches: torch.Tensor = tokens[0] if self._prefix else tokens
        first = tokens[1][:, :1] if self.class_token == "own" else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    def projection(self, layer: int, compute_dtype: torch.dtype) -> MapProjection:
        """See `TowerAdapter.projection`; it is the layer's first norm and the query and key rows of its projection."""
        block = self._blocks[layer - 1]
        attn = block.attn
        objection = _why_not_recomputable(self._trunk, block)
        if objection is not None:
            raise UsageError(
                f"maps 'recompute' need queries and keys that are one norm and one matrix away from the tokens; {objection}: "
                "use --maps uint8"
            )
        rows = 2 * self.num_heads * int(attn.head_dim)
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias])
        if bias is None:
            bias = attn.qkv.weight.new_zeros(rows)
        return rounded_projection(
            block.norm1, attn.qkv.weight[:rows], bias[:rows], self.num_heads, compute_dtype
        )


class _Attentions(TorchFunctionMode):
    """Count the calls of scaled_dot_product_attention, and call `attended` with the queries and keys of each."""

    def __init__(self, attended: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.count, self._attended = 0, attended

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.count += 1
            self._attended(self.count, args[0], args[1])
        return func(*args, **(kwargs or {}))


def _patches_of(heads_first: torch.Tensor, prefix: int) -> torch.Tensor:
    """Return the patches of queries or keys (S, H, prefix+P, D), as (S, P, H, D)."""
    return heads_first[:, :, prefix:].transpose(1, 2)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _check(model: Any) -> None:
    name = type(model).__name__
    if name not in _TRUNKS:
        raise UsageError(
            f"the image tower is timm's {name}; expected its VisionTransformer or Eva (SigLIP, EVA-02, PE-Core, DINO): "
            "where layers attend within windows, on several scales or not at all, a patch is not compared with every "
            "patch of the next frame, and adjacent-frame maps have no meaning"
        )
    if not all(type(getattr(block, "attn", None)).__name__ in _ATTENTIONS for block in model.blocks):
        kinds = sorted({type(getattr(block, "attn", block)).__name__ for block in model.blocks})
        raise UsageError(
            f"the tower's layers attend by {', '.join(kinds)}; expected {', '.join(_ATTENTIONS)}: adjacent-frame maps "
            "are a softmax of q.k, which is not what such a layer computes"
        )


def _why_not_recomputable(model: Any, block: Any) -> str | None:
    attn = block.attn
    if getattr(model, "rope", None) is not None:
        return "this tower rotates them by position (rotary embedding)"
    if not all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm)):
        return "this tower norms them"
    if attn.qkv is None:
        return "this tower has separate projections"
    if type(block).__name__ not in ("Block", "EvaBlock") or not isinstance(block.norm1, nn.LayerNorm):
        return f"the layers are {type(block).__name__} with {type(block.norm1).__name__}"
    return None
