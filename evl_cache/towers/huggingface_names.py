"""Names of CLIP's image tower in Hugging Face's transformers, read as open_clip's."""

import re
from collections.abc import Mapping

import torch

_CLIP = "vision_model.pre_layrnorm.weight"  # spelled so there; SigLIP's tower, which is another, has none
_PARTS = (
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.patch_embedding\.weight", "conv1.weight"),
    (r"pre_layrnorm\.", "ln_pre."),
    (r"post_layernorm\.", "ln_post."),
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
)
_QUERY = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")


def with_open_clip_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by name; CLIP's image towers of transformers get open_clip's names behind `visual.`.

    Queries, keys and values become one tensor there, and the projection is transposed. What has no such name, as the
    numbers of positions, is left out of such a tower; all else stays as it is.
    """
    found = dict(tensors)
    for prefix in [name.removesuffix(_CLIP) for name in tensors if name.endswith(_CLIP)]:
        inside = f"{prefix}vision_model."
        for name in [name for name in tensors if name.startswith(inside)]:
            value, own = found.pop(name), name.removeprefix(inside)
            if query := _QUERY.fullmatch(own):
                others = [tensors.get(name.replace(".q_proj.", f".{part}_proj.")) for part in "kv"]
                if all(other is not None and other.shape == value.shape for other in others):
                    whole = torch.cat([value, *(other for other in others if other is not None)])
                    found[f"{prefix}visual.transformer.resblocks.{query[1]}.attn.in_proj_{query[2]}"] = whole
                continue
            for pattern, replacement in _PARTS:
                if re.match(pattern, own):
                    found[f"{prefix}visual.{re.sub(f'^{pattern}', replacement, own)}"] = value
                    break
        projection = found.pop(f"{prefix}visual_projection.weight", None)
        if projection is not None:
            found[f"{prefix}visual.proj"] = projection.T
    return found
