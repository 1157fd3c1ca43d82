"""Checkpoints of the official EVL code, as heads of ours. Read with `weights_only`: data, never code."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evl_cache.errors import UsageError, WeightsError, first_line
from evl_cache.heads import EVLHead
from evl_cache.untrusted.head_files import check_archive, check_head_config, check_tensors

# official name within a decoder layer -> ours
_LAYER_NAMES = {
    "attn.q_proj": "q_proj",
    "attn.k_proj": "k_proj",
    "attn.v_proj": "v_proj",
    "attn.out_proj": "out_proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
}


def load_official_checkpoint(
    path: str | Path,
    num_heads: int | None = None,
    dropout: float = 0.5,
    *,
    num_frames: int | None = None,
    grid: tuple[int, int] | None = None,
) -> EVLHead:
    """Return the head of a checkpoint that the official EVL code wrote; it gives the official model's logits.

    Args:
        path: a file `{'model': {'module.decoder…': …, 'module.proj…': …}, …}`; a plain state dict and
            names without `module.` are read too. Backbone weights in it are ignored.
        num_heads: decoder heads, which the file does not tell; width of the queries / 64 by default.
        dropout: of the head returned, for further training.
        num_frames, grid: needed only where the file has no temporal positions, or no motion tables, to tell.

    Raises: WeightsError where the file is not such a checkpoint.
    """
    state = _official_state(Path(path))
    tensors = _renamed(state, path)
    sizes = _sizes(tensors, path, num_frames=num_frames, grid=grid)
    _check_sizes(sizes, num_heads, tensors, path)
    head = EVLHead(**sizes, num_heads=num_heads, dropout=dropout)
    missing, unexpected = head.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise WeightsError(
            f"{path}: not a complete official EVL head; missing {list(missing)[:4]}, unexpected {list(unexpected)[:4]}"
        )
    return head.eval()


def _official_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected a checkpoint of the official EVL code")
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch and pickle raise for a damaged file is open-ended
        raise WeightsError(
            f"{path}: cannot be read as a checkpoint of tensors ({first_line(error)[:200]}); "
            "expected a file written by the official EVL code"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: holds a {type(state).__name__}; expected a state dict of an EVL model")
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    try:
        check_tensors(tensors)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}; expected a checkpoint of the official EVL code") from error
    return tensors


def _renamed(state: Mapping[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        new = our_name(name)
        if new is not None:
            # The official class query may be stored with leading axes of size one.
            out[new] = (value.flatten() if new == "class_query" else value).to(torch.float32)
    if "class_query" not in out or "classifier.weight" not in out:
        raise WeightsError(
            f"{path}: has no decoder.cls_token and proj.2.weight; expected a checkpoint of the official EVL code"
        )
    return out


def our_name(name: str) -> str | None:
    """Our name of a parameter that an official state dict has (without `module.`), or None where no head has it."""
    if name == "decoder.cls_token":
        return "class_query"
    if match := re.fullmatch(r"decoder\.decoder_layers\.(\d+)\.(.+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"layers.{layer}.{_LAYER_NAMES.get(part, part)}.{kind}"
    if match := re.fullmatch(r"decoder\.temporal_conv\.(\d+)\.(weight|bias)", name):
        return f"layers.{match[1]}.conv.{match[2]}"
    if match := re.fullmatch(r"decoder\.temporal_pos_embed\.(\d+)", name):
        return f"layers.{match[1]}.pos_embed"
    if match := re.fullmatch(r"decoder\.cross_attention\.(\d+)\.w([12])", name):
        return f"layers.{match[1]}.motion_{'prev' if match[2] == '1' else 'next'}"
    if match := re.fullmatch(r"proj\.([02])\.(weight|bias)", name):
        return f"{'norm' if match[1] == '0' else 'classifier'}.{match[2]}"
    return None


def _sizes(
    tensors: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    num_frames: int | None,
    grid: tuple[int, int] | None,
) -> dict[str, Any]:
    layers = {int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not layers:
        raise WeightsError(f"{path}: decoder layers {sorted(layers)}; expected 0, 1, 2, … without a gap")
    try:
        qkv_width, width = tensors["layers.0.q_proj.weight"].shape
        mlp_width = tensors["layers.0.fc1.weight"].shape[0]
        num_classes = tensors["classifier.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: decoder weights are missing or misshapen ({error})") from error
    pos, table = tensors.get("layers.0.pos_embed"), tensors.get("layers.0.motion_prev")
    num_frames = num_frames if pos is None else int(pos.shape[0])
    grid = grid if table is None else _square_grid(table.shape[0], path)
    if num_frames is None or grid is None:
        raise WeightsError(
            f"{path}: does not tell its {'frames' if num_frames is None else 'grid of patches'}; pass it"
        )
    return {
        "num_layers": len(layers),
        "width": width,
        "qkv_width": qkv_width,
        "mlp_width": mlp_width,
        "num_classes": num_classes,
        "num_frames": num_frames,
        "grid": grid,
        "temporal_conv": "layers.0.conv.weight" in tensors,
        "temporal_pos_embed": pos is not None,
        "temporal_cross_attention": table is not None,
    }


def _check_sizes(
    sizes: Mapping[str, Any], num_heads: int | None, tensors: Mapping[str, torch.Tensor], path: str | Path
) -> None:
    """Refuse tensors that are not a head of these sizes, which were read off a few of them. Raises: WeightsError."""
    try:
        check_head_config(sizes)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}; expected a checkpoint of the official EVL code") from error
    with torch.device("meta"):
        own = EVLHead(**sizes, num_heads=num_heads).state_dict()
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            raise WeightsError(
                f"{path}: {name} is {tuple(tensors[name].shape)}, its other weights ask for {tuple(own[name].shape)}"
            )


def _square_grid(rows: int, path: str | Path) -> tuple[int, int]:
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise UsageError(
            f"{path}: motion tables of {rows} rows; expected (2g-1)^2 of a square grid of patches"
        )
    return (side + 1) // 2, (side + 1) // 2
