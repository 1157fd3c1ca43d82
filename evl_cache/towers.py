"""Image towers by name: open_clip's, those of a JSON configuration, and the one that comes with this package.

The only module that knows open_clip.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from torch import nn

from evl_cache.backbone import check_tower
from evl_cache.errors import UsageError, WeightsError, WeightsUnavailable
from evl_cache.spec import TINY_PRETRAINED, TINY_TOWER, TowerSpec
from evl_cache.weights import TowerWeights, read_tower_weights, tensors_sha256

_RANDOM_SEED = 0


def build_tower(model: str, pretrained: str) -> tuple[nn.Module, TowerSpec]:
    """The image tower of an open_clip model name or JSON configuration, with its weights.

    Args:
        model: name such as `ViT-B-16-quickgelu`, `evl-tiny`, or a JSON file as open_clip's (`embed_dim`, `vision_cfg`,
            `quick_gelu`, optionally `preprocess_cfg`).
        pretrained: tag (downloaded; evl-tiny's comes with the package), file, or `none` for seeded random weights.

    Returns: the float32 tower on the CPU, and its spec.
    Raises: UsageError for an unknown model or a tower that is no ViT; WeightsError where the weights cannot
        be had or do not belong to the model.
    """
    config, preprocess = _model_config(model)
    visual = _random_tower(config, model)
    check_tower(visual)
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
    if model == TINY_TOWER:
        return json.loads(_bundled(f"{TINY_TOWER}.json").read_text(encoding="utf-8")), preprocess
    if not model.endswith(".json"):
        config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
        if config is None:
            near = [name for name in open_clip.list_models() if name.startswith("ViT-")]
            raise UsageError(
                f"unknown model {model!r}; expected an open_clip name ({', '.join(near[:6])}, …), {TINY_TOWER} "
                "or a JSON file"
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


def _bundled(name: str) -> Path:
    """A file of the package's data."""
    return Path(str(files("evl_cache") / "data" / name))


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
    if model == TINY_TOWER:
        if pretrained != TINY_PRETRAINED:
            raise WeightsError(
                f"--pretrained {pretrained!r} is neither a file nor a tag of {TINY_TOWER}; expected "
                f"{TINY_PRETRAINED}, a file, or none"
            )
        return read_tower_weights(_bundled(f"{TINY_TOWER}.safetensors")), {}
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
