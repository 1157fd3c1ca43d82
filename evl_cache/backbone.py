"""The frozen image tower: unpooled tokens of several blocks and the maps made from their queries and keys.

The only module that knows open_clip.
B clips, T frames, P patches, N = 1+P tokens, C channels, H heads, D head width.
"""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from torch import nn

from evl_cache.attention_maps import MapProjection, adjacent_frame_maps
from evl_cache.errors import UsageError, WeightsError, WeightsUnavailable
from evl_cache.spec import TowerSpec
from evl_cache.weights import TowerWeights, read_tower_weights, tensors_sha256

_RANDOM_SEED = 0


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
        _check_tower(visual)
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
    _check_tower(visual)
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


def _check_tower(visual: nn.Module) -> None:
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


def build_tower(model: str, pretrained: str) -> tuple[nn.Module, TowerSpec]:
    """The image tower of an open_clip model name or JSON configuration, with its weights.

    Args:
        model: name such as `ViT-B-16-quickgelu`, or a JSON file as open_clip's (`embed_dim`, `vision_cfg`,
            `quick_gelu`, optionally `preprocess_cfg`).
        pretrained: tag (downloaded), file, or `none` for seeded random weights.

    Returns: the float32 tower on the CPU, and its spec.
    Raises: UsageError for an unknown model or a tower that is no ViT; WeightsError where the weights cannot
        be had or do not belong to the model.
    """
    config, preprocess = _model_config(model)
    visual = _random_tower(config, model)
    _check_tower(visual)
    sides = (*visual.image_size, *visual.patch_size)  # type: ignore[misc]
    if sides[0] != sides[1] or sides[2] != sides[3]:
        raise UsageError(f"{model}: image and patch sizes {sides}; expected square ones, as crops are square")
    if pretrained != "none":
        weights, tag_preprocess = _find_weights(model, pretrained, config)
        _load(visual, weights, model=model, pretrained=pretrained)
        preprocess = {**preprocess, **tag_preprocess}
    tower: Any = visual
    return visual, TowerSpec(
        model=Path(model).stem if model.endswith(".json") else model,
        pretrained=Path(pretrained).name if Path(pretrained).is_file() else pretrained,
        weights_sha256=tensors_sha256(visual.state_dict()),
        image_size=int(tower.image_size[0]),
        patch_size=int(tower.patch_size[0]),
        width=int(tower.conv1.out_channels),
        blocks=len(tower.transformer.resblocks),
        heads=int(tower.transformer.resblocks[0].attn.num_heads),
        quick_gelu=bool(config.get("quick_gelu", False)),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
    )


def _model_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import open_clip
    from open_clip.transform import PreprocessCfg

    defaults = PreprocessCfg()
    preprocess = {"mean": defaults.mean, "std": defaults.std}
    if not model.endswith(".json"):
        config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
        if config is None:
            near = [name for name in open_clip.list_models() if name.startswith("ViT-")]
            raise UsageError(
                f"unknown model {model!r}; expected an open_clip name ({', '.join(near[:6])}, …) or a JSON file"
            )
        return config, preprocess
    try:
        content = json.loads(Path(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{model}: cannot be read as a JSON model configuration ({error})") from error
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("vision_cfg"), dict)
        or "embed_dim" not in config
    ):
        raise UsageError(f"{model}: has no 'embed_dim' and 'vision_cfg'; expected an open_clip configuration")
    given = content.get("preprocess_cfg") or {}
    try:
        found = {name: tuple(map(float, given.get(name, default))) for name, default in preprocess.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{model}: preprocess_cfg is not readable ({error}); expected mean and std"
        ) from error
    if any(len(values) != 3 for values in found.values()) or 0.0 in found["std"]:
        raise UsageError(f"{model}: preprocess_cfg has {found}; expected three numbers each, std above 0")
    return config, found


def _random_tower(config: dict[str, Any], model: str) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    if "timm_model_name" in config["vision_cfg"]:
        raise UsageError(
            f"{model}: its image tower is timm's {config['vision_cfg']['timm_model_name']}; expected an "
            "open_clip VisionTransformer (ViT-…)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        try:
            vision = CLIPVisionCfg(**deepcopy(config["vision_cfg"]))
            visual: nn.Module = _build_vision_tower(
                config["embed_dim"], vision, config.get("quick_gelu", False)
            )
        except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
            raise UsageError(f"{model}: not a valid open_clip vision_cfg ({error})") from error
        _tie_queries_to_keys(visual, config.get("evl_init", {}))
    return visual


@torch.no_grad()
def _tie_queries_to_keys(visual: Any, init: dict[str, Any]) -> None:
    """Give an untrained tower maps that mean something: a patch attends to patches that look like it.

    With unrelated random query and key matrices an attention map says nothing about motion; with the same
    matrix for both, q.k is a similarity. Only for the demo's random towers (`evl_init` of the JSON file).
    """
    if not init.get("tie_query_key", False):
        return
    gain = float(init.get("query_key_gain", 1.0))
    for block in visual.transformer.resblocks:
        width = block.attn.embed_dim
        shared = torch.randn(width, width) * gain * width**-0.5
        block.attn.in_proj_weight[:width] = shared
        block.attn.in_proj_weight[width : 2 * width] = shared


def _find_weights(model: str, pretrained: str, config: dict[str, Any]) -> tuple[TowerWeights, dict[str, Any]]:
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    quick_gelu = bool(config.get("quick_gelu", False))
    if Path(pretrained).is_file():
        weights = read_tower_weights(Path(pretrained))
        _check_activation(model, pretrained, needed=weights.is_openai_archive or None, has=quick_gelu)
        return weights, {}
    tag = get_pretrained_cfg(model, pretrained)
    if not tag:
        tags = list_pretrained_tags_by_model(model)
        raise WeightsError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {model}; "
            f"expected one of {', '.join(tags) or '(no tags)'}, a file, or none"
        )
    _check_activation(model, pretrained, needed=bool(tag.get("quick_gelu", False)), has=quick_gelu)
    return read_tower_weights(_download(model, pretrained, tag)), {
        name: tuple(tag[name]) for name in ("mean", "std") if tag.get(name) is not None
    }


def _check_activation(model: str, pretrained: str, *, needed: bool | None, has: bool) -> None:
    if needed is None or needed == has:
        return
    remedy = f"--model {model}-quickgelu" if needed else f"--model {model.removesuffix('-quickgelu')}"
    if model.endswith(".json"):
        remedy = f'"quick_gelu": {str(needed).lower()} in that file'
    raise WeightsError(
        f"QuickGELU mismatch: weights {pretrained!r} were trained {'with' if needed else 'without'} it, "
        f"model {model} is {'with' if has else 'without'}; use {remedy}"
    )


@contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """Without a network the hub's client retries for a minute: there, have it look into its cache only."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    host = urlparse(constants.ENDPOINT).hostname
    if not getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _download(model: str, pretrained: str, tag: dict[str, Any]) -> Path:
    from open_clip.pretrained import download_pretrained

    try:
        with _offline_where_unreachable():
            return Path(download_pretrained(tag))
    except Exception as error:  # the hub's client raises many kinds; all mean that the file is not here
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise WeightsUnavailable(
            f"weights {pretrained!r} of {model} could not be downloaded ({reason}); no network? Fetch them where "
            "there is one and pass --pretrained FILE, share its hub cache (HF_HOME), or use --pretrained none"
        ) from error


def _load(visual: nn.Module, weights: TowerWeights, *, model: str, pretrained: str) -> None:
    own = visual.state_dict()
    wrong = [n for n in own if n in weights.tensors and weights.tensors[n].shape != own[n].shape]
    missing = [name for name in own if name not in weights.tensors]
    extra = [name for name in weights.tensors if name not in own]
    if wrong or missing or extra:
        first = (
            f"{wrong[0]} is {tuple(weights.tensors[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
            if wrong
            else f"missing {missing[:2]}, not in the model {extra[:2]}"
        )
        raise WeightsError(
            f"weights {pretrained!r} do not match model {model}: {first} ({len(wrong)} shapes, {len(missing)} "
            f"missing, {len(extra)} extra); choose the --model they were trained for"
        )
    visual.load_state_dict(weights.tensors)
