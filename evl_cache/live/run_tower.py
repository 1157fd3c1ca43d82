"""A run's own tower and views, for videos that no cache holds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from evl_cache.errors import UsageError, WeightsError
from evl_cache.runs import RunConfig, RunFile
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.towers import Backbone, build_tower


def live_spec(config: RunConfig, run: Path, *, num_clips: int) -> CacheSpec:
    """The spec of the features a run was trained on, for other clips and with the views of validation.

    Raises: UsageError for an imported head, which has neither.
    """
    if config.features is None:
        raise UsageError(
            f"{run}: its head was imported, so it has no tower and no views of its own; extract a cache and use eval"
        )
    spec = CacheSpec.from_json(config.features)
    views = spec.views if config.tower is None else ViewSpec(**config.tower["views"])
    return replace(spec, views=views, num_clips=num_clips, layers=config.layers or spec.layers, block_clips=1)


def run_backbone(
    config: RunConfig,
    run: Path,
    spec: CacheSpec,
    model: str | None,
    pretrained: str | None,
    *,
    with_maps: bool,
    device: torch.device,
) -> Backbone:
    """The tower of a run, cut after the last layer that its head reads.

    Args:
        model: where it is now; as the run names it by default.
        pretrained: where its weights are now; as the run names them by default.
        with_maps: whether the head reads maps.
        device: where the tower runs.

    Raises: UsageError where the run does not name one; WeightsError where this is another one.
    """
    names: Mapping[str, str] = config.tower or {}
    kept = run / RunFile.TOWER
    model = model or (str(kept) if kept.exists() else names.get("model"))
    pretrained = pretrained or names.get("pretrained")
    if model is None or pretrained is None:
        raise UsageError(
            f"{run}: it does not say where its tower {spec.tower.model} is; give --model and --pretrained"
        )
    tower = build_tower(model, pretrained)
    if tower.spec.weights_sha256 != spec.tower.weights_sha256:
        raise WeightsError(
            f"{model} ({pretrained}) has weights {tower.spec.weights_sha256[:12]}, the run was trained on features of "
            f"{spec.tower.model} ({spec.tower.pretrained}) with {spec.tower.weights_sha256[:12]}; give --model and "
            "--pretrained of that one"
        )
    # On a CPU float16 is slow, and the head takes float32 anyway.
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, spec.compute_dtype)
    return Backbone(tower.visual.to(device=device, dtype=dtype), spec.layers, with_maps=with_maps)
