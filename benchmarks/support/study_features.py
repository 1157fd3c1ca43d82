"""What the rate-distortion study and the table of sizes measure: generated features, and those of real clips.

S clips, L layers, T frames, N = 1 + P tokens, P patches, C channels. ViT-B/16, 8 frames, layers 8-12, and the
tokens of layer 7, from which the maps of layer 8 are made.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.outlier_features import outlier_features
from benchmarks.support.stored_features import LAYERS, VIT_B_16
from evl_cache.attention_maps import MapProjection, maps_from_tokens
from evl_cache.clips import Clip
from evl_cache.extract.prepare import prepare_clip
from evl_cache.spec import ViewSpec
from evl_cache.towers import build_tower
from evl_cache.towers.backbone import Backbone, map_projections
from evl_cache.towers.names import default_pretrained
from evl_cache.video.pool import DecodePool

MODEL = "ViT-B-16-quickgelu"
VARIABLE = "EVL_UT_INTERACTION"
ALL_LAYERS = (LAYERS[0] - 1, *LAYERS)
FLATTEST, SHARPEST = 0.05, 10.0  # deviation of a head's logits: as wide as `outlier_features.softmax_maps`


@dataclass(frozen=True, kw_only=True)
class StudyFeatures:
    """Of S clips: `tokens` S of {layer: (T, N, C)} of layers 7-12, `maps` S of {layer: (2, T-1, P, P)} of 8-12.

    names: of the clips' files, where there are files.
    """

    name: str
    names: list[str] = field(default_factory=list)
    tokens: list[dict[int, Tensor]]
    maps: list[dict[int, Tensor]]
    projections: Mapping[int, MapProjection]


def generated(clips: int) -> StudyFeatures:
    """Tokens of `outlier_features`, and maps that generated queries and keys of theirs give."""
    tokens = []
    for seed in range(clips):
        values = outlier_features(clips=1, layers=len(ALL_LAYERS), seed=seed).tokens[0]
        tokens.append(dict(zip(ALL_LAYERS, values, strict=True)))
    projections = {layer: _projection(tokens[0][layer - 1], seed=layer) for layer in LAYERS}
    maps = [
        {layer: maps_from_tokens(clip[layer - 1][None], projections[layer])[0] for layer in LAYERS}
        for clip in tokens
    ]
    return StudyFeatures(name="generated", tokens=tokens, maps=maps, projections=projections)


def _projection(below: Tensor, *, seed: int) -> MapProjection:
    """A norm that evens out the channels, as a trained one does, and heads from nearly flat to nearly one-hot."""
    channels, heads = below.shape[-1], VIT_B_16.heads
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, heads, channels // heads, channels, generator=generator) * channels**-0.5
    sharpness = FLATTEST * (SHARPEST / FLATTEST) ** torch.linspace(0, 1, heads)
    flat = below.flatten(0, -2)
    return MapProjection(
        norm_weight=flat.std(-1).median() / flat.std(0),
        norm_bias=torch.zeros(channels),
        norm_eps=1e-5,
        weight=(weight * sharpness.sqrt()[None, :, None, None]).flatten(0, 2).half(),
        bias=torch.zeros(2 * channels),
        num_heads=heads,
    )


def ut_interaction(
    clips: int,
    *,
    model: str = MODEL,
    layers: Sequence[int] = LAYERS,
    views: ViewSpec = ViewSpec(),  # noqa: B008 - frozen
) -> StudyFeatures | None:
    """Clips spread over UT-Interaction through a tower; None where they are not at hand.

    model: ViT-B/16 with random weights, or `evl-tiny` with its own.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "ut_interaction"
    root = Path(os.environ.get(VARIABLE) or default)
    if not root.is_dir():
        return None
    visual, tower = build_tower(model, "none" if model == MODEL else default_pretrained(model))
    backbone = Backbone(visual, (layers[0] - 1, *layers))
    tokens, maps, names = [], [], []
    videos = sorted(root.rglob("*.avi"))
    with DecodePool(1) as pool:
        for video in videos[:: max(1, len(videos) // clips)][:clips]:
            clip = Clip(id=video.name, path=str(video), label=0, split="all")
            prepared = prepare_clip(clip, root, tower=tower, views=views, decode=pool.frames)
            assert prepared.samples is not None, prepared.record.error
            features = backbone(prepared.samples)
            tokens.append({layer: value[0] for layer, value in features.tokens.items()})
            maps.append({layer: features.maps[layer][0] for layer in layers})
            names.append(video.name)
    projections = map_projections(visual, tuple(layers), compute_dtype=torch.float32)
    return StudyFeatures(
        name="ut_interaction", names=names, tokens=tokens, maps=maps, projections=projections
    )


def queries_and_keys(below: Tensor, projection: MapProjection) -> tuple[Tensor, Tensor]:
    """Float32 queries and keys (T, N, C) of a block, from the tokens (T, N, C) below: what a plain dump holds."""
    norm = torch.nn.functional.layer_norm(
        below, below.shape[-1:], projection.norm_weight, projection.norm_bias, projection.norm_eps
    )
    q, k = torch.nn.functional.linear(norm, projection.weight.float(), projection.bias).chunk(2, dim=-1)
    return q.clone(), k.clone()
