"""Build image towers by name: open_clip's, timm's, those of a JSON configuration, and the package's own."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evl_cache.errors import UsageError
from evl_cache.spec import TowerSpec
from evl_cache.towers.families import adapter_of
from evl_cache.towers.loading import load_weights
from evl_cache.towers.names import TIMM_PREFIX, TINY_TOWER, is_model_file, is_weights_file
from evl_cache.towers.pretrained import bundled, find_weights
from evl_cache.towers.timm_names import build_timm
from evl_cache.towers.tower import Tower
from evl_cache.towers.weights import tensors_sha256

_RANDOM_SEED = 0


def build_tower(model: str, pretrained: str) -> Tower:
    """Return an image tower with its weights: the float32 module on the CPU, and its spec.

    Args:
        model: open_clip name such as `ViT-B-16-quickgelu`, `evl-tiny`, `timm/NAME` or `timm/NAME@PIXELS`, or a JSON
            file as open_clip's (`embed_dim`, `vision_cfg`, `quick_gelu`, optionally `preprocess_cfg`).
        pretrained: tag (downloaded; evl-tiny's comes with the package), file, or `none` for seeded random weights.

    Raises: UsageError for an unknown model or a tower that EVL cannot read; WeightsError for weights that cannot be
        found, downloaded or read, or do not belong to the model.
    """
    if model.startswith(TIMM_PREFIX):
        visual, preprocess, pretrained_name = build_timm(model, pretrained, seed=_RANDOM_SEED)
        return Tower(visual, _describe(visual, model, pretrained_name, preprocess, quick_gelu=False))
    config, preprocess = _model_config(model)
    visual = _random_tower(config, model)
    adapter_of(visual)  # raises before anything is downloaded
    if pretrained != "none":
        weights, tag_preprocess = find_weights(model, pretrained, config)
        load_weights(visual, weights, model=model, pretrained=pretrained)
        preprocess = {**preprocess, **tag_preprocess}
    spec = _describe(
        visual,
        Path(model).stem if is_model_file(model) else model,
        Path(pretrained).name if is_weights_file(pretrained) else pretrained,
        preprocess,
        quick_gelu=bool(config.get("quick_gelu", False)),
    )
    return Tower(visual, spec)


def tower_shape(model: str) -> TowerSpec:
    """Return the spec of a model's tower without its weights, which are neither made nor fetched: no digest, no names of them.

    Raises: UsageError as `build_tower`.
    """
    with torch.device("meta"):
        if model.startswith(TIMM_PREFIX):
            visual, preprocess, _ = build_timm(model, "none", seed=_RANDOM_SEED)
            quick_gelu = False
        else:
            config, preprocess = _model_config(model)
            visual, quick_gelu = _random_tower(config, model), bool(config.get("quick_gelu", False))
        return _describe(visual, model, "", preprocess, quick_gelu=quick_gelu, is_shape=True)


def _describe(
    visual: nn.Module,
    model: str,
    pretrained: str,
    preprocess: dict[str, Any],
    *,
    quick_gelu: bool,
    is_shape: bool = False,
) -> TowerSpec:
    tower = adapter_of(visual)
    sides = (*tower.image_size, *tower.patch_size)
    if sides[0] != sides[1] or sides[2] != sides[3]:
        raise UsageError(
            f"{model}: image and patch sizes {sides}; expected square ones: choose another model"
        )
    return TowerSpec(
        model=model,
        pretrained=pretrained,
        weights_sha256="" if is_shape else tensors_sha256(visual.state_dict()),
        image_size=tower.image_size[0],
        patch_size=tower.patch_size[0],
        width=tower.width,
        blocks=tower.num_layers,
        heads=tower.num_heads,
        quick_gelu=quick_gelu,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        class_token=tower.class_token,
        registers=tower.registers,
    )


def _model_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import open_clip
    from open_clip.transform import PreprocessCfg

    defaults = PreprocessCfg()
    preprocess = {"mean": defaults.mean, "std": defaults.std}
    if model == TINY_TOWER:
        return json.loads(bundled(f"{TINY_TOWER}.json").read_text(encoding="utf-8")), preprocess
    if not is_model_file(model):
        config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
        if config is None:
            near = [name for name in open_clip.list_models() if name.startswith("ViT-")]
            raise UsageError(
                f"unknown model {model!r}; expected an open_clip name ({', '.join(near[:6])}, …), {TINY_TOWER}, "
                "timm/NAME or a JSON file"
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
        raise UsageError(
            f"{model}: has no 'embed_dim' and 'vision_cfg'; expected a configuration as open_clip's"
        )
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

    given = {**deepcopy(config["vision_cfg"]), "timm_model_pretrained": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        try:
            vision = CLIPVisionCfg(**given)
            visual: Any = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
            if vision.timm_model_name and hasattr(visual, "set_input_size"):
                visual.set_input_size(vision.image_size)
        except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
            raise UsageError(f"{model}: not a valid open_clip vision_cfg ({error})") from error
        _tie_queries_to_keys(visual, config.get("evl_init", {}))
    tower: nn.Module = visual
    return tower


@torch.no_grad()
def _tie_queries_to_keys(visual: Any, init: dict[str, Any]) -> None:
    """Let an untrained tower's patches attend to patches that look like them, so that its maps show motion.

    With unrelated random query and key matrices an attention map says nothing about motion. With one matrix for both,
    q.k is a similarity. Only the random towers of the demo ask for it, by `evl_init` of their JSON file.
    """
    if not init.get("tie_query_key", False):
        return
    gain = float(init.get("query_key_gain", 1.0))
    for block in visual.transformer.resblocks:
        width = block.attn.embed_dim
        shared = torch.randn(width, width) * gain * width**-0.5
        block.attn.in_proj_weight[:width] = shared
        block.attn.in_proj_weight[width : 2 * width] = shared
