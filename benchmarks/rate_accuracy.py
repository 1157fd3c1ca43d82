"""Accuracy of a decoder trained on features that were stored in different ways, from one cache.

B clips, T frames, N tokens, C channels. Every variant starts from the cache's int8 tokens and uint8 maps: 8 bits
are what is stored, fewer bits are these tokens quantised again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.storage_variants import fewer_bits, grouped_int4, sqrt_maps
from evl_cache.attention_maps import MapProjection, maps_from_tokens
from evl_cache.backbone import map_projections
from evl_cache.clips import select
from evl_cache.heads import build_head
from evl_cache.quantize import (
    QuantizedMaps,
    QuantizedTokens,
    dequantize_maps,
    dequantize_tokens,
    quantize_maps,
)
from evl_cache.spec import CacheSpec
from evl_cache.store import FeatureCache
from evl_cache.towers import build_tower

Tokens = QuantizedTokens | Tensor
Batch = tuple[list[Tokens], list[QuantizedMaps] | None]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """All features of a head's layers: `tokens` a (B, T, N, C) for each, `maps` likewise or None."""

    tokens: list[Tokens]
    maps: list[QuantizedMaps] | None

    def part(self, rows: Tensor) -> Batch:
        """Features of some clips."""
        tokens = [t[rows] if isinstance(t, Tensor) else _rows(t, rows) for t in self.tokens]
        if self.maps is None:
            return tokens, None
        return tokens, [QuantizedMaps(codes=m.codes[rows], row_max=m.row_max[rows]) for m in self.maps]


@dataclass(frozen=True, kw_only=True)
class Side:
    """Clips to train or to score on: all features of a cache, their labels (clips,), and the rows that count."""

    features: Stored
    labels: Tensor
    rows: Tensor

    def batches(self, batch: int, shuffle: torch.Generator | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Arguments of a head, and labels."""
        rows = self.rows if shuffle is None else self.rows[torch.randperm(len(self.rows), generator=shuffle)]
        for part in rows.split(batch):
            yield self.features.part(part), self.labels[part]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of every run."""

    head: str
    epochs: int
    batch: int = 32
    lr: float = 4e-4
    warmup_steps: int = 0
    seeds: tuple[int, ...] = (0,)


VARIANTS = ("8bit", "6bit", "4bit", "int4-groups", "maps4", "recompute", "no-maps")
UT_VARIANTS = ("8bit", "6bit", "4bit", "recompute", "no-maps")  # minutes each


def variant(
    name: str, cache: FeatureCache, layers: Sequence[int], projections: dict[int, MapProjection]
) -> Stored:
    """All features of a cache, as one of VARIANTS would give them; `8bit` is what the cache holds."""
    batch = cache.read_stored(range(len(cache)), layers)
    tokens: list[Tokens] = list(batch.tokens)
    maps = [m for m in batch.maps or [] if isinstance(m, QuantizedMaps)]
    if name in ("6bit", "4bit", "int4-groups"):
        tokens = [_each(t, name) for t in batch.tokens if isinstance(t, QuantizedTokens)]
    if name == "maps4":
        maps = [_coarser(m) for m in maps]
    if name == "recompute":
        maps = [_recomputed(cache, layer, projections[layer]) for layer in layers]
    return Stored(tokens=tokens, maps=None if name == "no-maps" else maps)


def train(sides: tuple[Side, Side], spec: CacheSpec, *, training: Training, seed: int) -> dict[str, float]:
    """Train on the first side, score on the second: top-1 in percent and losses."""
    torch.manual_seed(seed)
    head = build_head(
        training.head,
        num_layers=len(sides[0].features.tokens),
        width=spec.tower.width,
        num_frames=spec.views.frames,
        grid=spec.tower.grid,
        num_classes=len(spec.classes),
        temporal_cross_attention=sides[0].features.maps is not None,
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.lr, weight_decay=0.05)
    steps = training.epochs * -(-len(sides[0].rows) // training.batch)
    factor = _cosine(steps, training.warmup_steps)
    shuffle = torch.Generator().manual_seed(seed)
    step, losses = 0, []
    for epoch in range(training.epochs):
        for features, labels in sides[0].batches(training.batch, shuffle):
            optimizer.param_groups[0]["lr"] = training.lr * factor(step)
            loss = F.cross_entropy(head(*features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if epoch == training.epochs - 1:
                losses.append(float(loss.detach()))
    head.eval()
    with torch.no_grad():
        found = [(head(*features), labels) for features, labels in sides[1].batches(training.batch)]
    logits, labels = (torch.cat(values) for values in zip(*found, strict=True))
    return {
        "top1": 100 * float((logits.argmax(1) == labels).float().mean()),
        "val_loss": float(F.cross_entropy(logits, labels)),
        "train_loss": sum(losses) / len(losses),
    }


def _cosine(steps: int, warmup: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def _rows(tokens: QuantizedTokens, rows: Tensor) -> QuantizedTokens:
    assert tokens.scale is not None
    return QuantizedTokens(codes=tokens.codes[rows], affine=tokens.affine[rows], scale=tokens.scale[rows])


def _value(tokens: QuantizedTokens, clip: int) -> Tensor:
    part = _rows(tokens, torch.tensor([clip]))
    return dequantize_tokens(part.codes, part.affine, part.scale)  # (1,T,N,C)


def _each(tokens: QuantizedTokens, name: str) -> Tokens:
    values = (_value(tokens, clip) for clip in range(len(tokens.codes)))
    if name == "int4-groups":
        return torch.cat([grouped_int4(v[0], difference=False).value().half()[None] for v in values])
    found = [fewer_bits(value, int(name[0])) for value in values]
    scales = [one.scale for one in found if one.scale is not None]
    return QuantizedTokens(
        codes=torch.cat([one.codes for one in found]),
        affine=torch.cat([one.affine for one in found]),
        scale=torch.cat(scales),
    )


def _coarser(maps: QuantizedMaps) -> QuantizedMaps:
    parts = [
        quantize_maps(sqrt_maps(dequantize_maps(codes, top), bits=4).value())
        for codes, top in zip(maps.codes, maps.row_max, strict=True)
    ]
    return _joined(parts)


def _recomputed(cache: FeatureCache, layer: int, projection: MapProjection) -> QuantizedMaps:
    """Maps from the stored tokens below; kept at 8 bits, which costs a fifth of what int8 tokens cost."""
    below = cache.read_stored(range(len(cache)), (layer - 1,), with_maps=False).tokens[0]
    assert isinstance(below, QuantizedTokens)
    parts = [
        quantize_maps(maps_from_tokens(_value(below, clip), projection)[0]) for clip in range(len(cache))
    ]
    return _joined(parts)


def _joined(parts: Sequence[QuantizedMaps]) -> QuantizedMaps:
    return QuantizedMaps(
        codes=torch.stack([part.codes for part in parts]),
        row_max=torch.stack([part.row_max for part in parts]),
    )


def compare(
    caches: tuple[FeatureCache, FeatureCache],
    rows: tuple[Tensor, Tensor],
    *,
    layers: Sequence[int],
    projections: dict[int, MapProjection],
    training: Training,
    variants: Sequence[str] = VARIANTS,
) -> dict[str, dict[str, float]]:
    """Mean over seeds of each variant's figures; the same seeds for all."""
    out = {}
    for name in variants:
        features = [variant(name, cache, layers, projections) for cache in dict.fromkeys(caches)]
        sides = (
            Side(features=features[0], labels=torch.from_numpy(caches[0].labels), rows=rows[0]),
            Side(features=features[-1], labels=torch.from_numpy(caches[1].labels), rows=rows[1]),
        )
        runs = [train(sides, caches[0].spec, training=training, seed=seed) for seed in training.seeds]
        out[name] = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        print(name, out[name], flush=True)
    return out


def ut_interaction(path: Path, val_list: Path) -> dict[str, dict[str, float]]:
    """A cache of UT-Interaction, ViT-B/16, layers 8-12; clips of the list are scored, the others trained on."""
    cache = FeatureCache(path)
    spec = cache.spec
    val = set(select(cache.clips, val_list.read_text().split("\n")[:-1], source=str(val_list)))
    rows = torch.arange(len(cache))
    is_val = torch.tensor([int(clip) in val for clip in cache.sample_clips])
    return compare(
        (cache, cache),
        (rows[~is_val], rows[is_val]),
        layers=spec.layers[-4:],
        projections=_projections(spec.tower.model, spec.tower.pretrained, spec),
        training=Training(head="decoder4", epochs=12),
        variants=UT_VARIANTS,
    )


def rendered_motions(directory: Path) -> dict[str, dict[str, float]]:
    """What `evl-cache demo --out DIRECTORY` left: motions that only the maps and the order of frames tell."""
    caches = (
        FeatureCache(directory / "caches" / "train"),
        FeatureCache(directory / "caches" / "val"),
    )
    model = str(files("evl_cache") / "data" / "demo-tower.json")
    return compare(
        caches,
        (torch.arange(len(caches[0])), torch.arange(len(caches[1]))),
        layers=caches[0].spec.layers[-2:],
        projections=_projections(model, "none", caches[0].spec),
        training=Training(head="decoder2", epochs=15, lr=2e-3, warmup_steps=75, seeds=(0, 1, 2)),
    )


def _projections(model: str, pretrained: str, spec: CacheSpec) -> dict[int, MapProjection]:
    visual, tower = build_tower(model, pretrained)
    assert tower.weights_sha256 == spec.tower.weights_sha256
    return map_projections(visual, spec.layers[1:], compute_dtype=getattr(torch, spec.compute_dtype))
