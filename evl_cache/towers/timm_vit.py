"""timm's VisionTransformer and Eva, alone or as the trunk of open_clip's TimmModel.

SigLIP and DINOv2 are of the first class, EVA-02, PE-Core and DINOv3 of the second.

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
    """The timm model inside: the tower itself, or its trunk; None for another library's tower."""
    for candidate in (visual, getattr(visual, "trunk", None)):
        if isinstance(candidate, nn.Module) and type(candidate).__module__.startswith("timm."):
            return candidate
    return None


class TimmVit:
    """See `TowerAdapter`.

    The blocks run as timm runs them. Queries and keys are those that timm hands to the attention itself, so
    whatever a block does to them is in them: biases, norms, and rotary positions.

    Raises: UsageError for a model without one sequence of tokens that attend to each other by q.k alone.
    """

    def __init__(self, trunk: nn.Module) -> None:
        model: Any = trunk
        _check(model)
        self._trunk, self._blocks = model, model.blocks
        for block in self._blocks:
            block.attn.fused_attn = True  # the one call in which queries and keys are seen
        self.image_size = _pair(model.patch_embed.img_size)
        grid = model.patch_embed.grid_size
        self.patch_size = (self.image_size[0] // grid[0], self.image_size[1] // grid[1])
        self.width, self.num_blocks = int(model.embed_dim), len(self._blocks)
        self.num_heads = int(self._blocks[0].attn.num_heads)
        self.class_token = "mean" if model.cls_token is None else "own"
        self._prefix = int(model.num_prefix_tokens)
        self.registers = self._prefix - (self.class_token == "own")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = next(self._blocks.parameters()).dtype
        return dtype

    def tokens(
        self, frames: torch.Tensor, layers: Sequence[int], keep: KeepQueriesKeys | None
    ) -> dict[int, torch.Tensor]:
        """timm's own way to its intermediate tokens, which ends after the last block asked for."""

        def attended(number: int, q: torch.Tensor, k: torch.Tensor) -> None:
            if keep is not None and number in layers:
                keep(number, _patches_of(q, self._prefix), _patches_of(k, self._prefix))

        with _Attentions(attended) as seen:
            found = self._trunk.forward_intermediates(
                frames,
                indices=[number - 1 for number in layers],
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
                return_prefix_tokens=self._prefix > 0,
            )
        assert seen.count == max(layers), f"{seen.count} attentions in {max(layers)} blocks"
        return {number: self._with_class_token(block) for number, block in zip(layers, found, strict=True)}

    def _with_class_token(self, block: Any) -> torch.Tensor:
        patches: torch.Tensor = block[0] if self._prefix else block
        first = block[1][:, :1] if self.class_token == "own" else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    def projection(self, layer: int, compute_dtype: torch.dtype) -> MapProjection:
        """The block's first norm and the query and key rows of its projection, where they are all there is."""
        block = self._blocks[layer - 1]
        attn = block.attn
        objection = _why_not_recomputable(self._trunk, block)
        if objection is not None:
            raise UsageError(
                f"maps 'recompute' need queries and keys that are a norm and a matrix away from the tokens; {objection}: "
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
    """Counts the calls of scaled_dot_product_attention, and shows the queries and keys of each."""

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
    """(S, H, prefix+P, D) -> (S, P, H, D)."""
    return heads_first[:, :, prefix:].transpose(1, 2)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _check(model: Any) -> None:
    name = type(model).__name__
    if name not in _TRUNKS:
        raise UsageError(
            f"the image tower is timm's {name}; expected its VisionTransformer or Eva (SigLIP, EVA-02, PE-Core, DINO): "
            "where blocks attend within windows, on several scales or not at all, a patch is not compared with every "
            "patch of the next frame, and adjacent-frame maps have no meaning"
        )
    if not all(type(getattr(block, "attn", None)).__name__ in _ATTENTIONS for block in model.blocks):
        kinds = sorted({type(getattr(block, "attn", block)).__name__ for block in model.blocks})
        raise UsageError(
            f"the tower's blocks attend by {', '.join(kinds)}; expected {', '.join(_ATTENTIONS)}: adjacent-frame maps "
            "are a softmax of q.k, and would not be what such a block sees"
        )


def _why_not_recomputable(model: Any, block: Any) -> str | None:
    attn = block.attn
    if getattr(model, "rope", None) is not None:
        return "this tower turns them by position (rotary)"
    if not all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm)):
        return "this tower norms them"
    if attn.qkv is None:
        return "this tower has separate projections"
    if type(block).__name__ not in ("Block", "EvaBlock") or not isinstance(block.norm1, nn.LayerNorm):
        return f"the blocks are {type(block).__name__} with {type(block.norm1).__name__}"
    return None
