"""Accuracy of heads trained on features stored in different ways: `python -m benchmarks.rate_accuracy --table --json`.

UT-Interaction through evl-tiny, 8 frames at stride 8, blocks 5-8 (and tokens of block 4, which recomputed maps need),
computed once in float32. Every storage is applied to these, and decoder4 is trained on what a reader would get: five
folds of sequences, each scored by a head trained on the other four; a seed's figures are those over all folds' clips.
Seeds, order and settings are the same for every storage. "point" is left out, whose clips are narrower than the rest.
`--demo DIRECTORY --epochs 15` does the same from the caches that `evl-cache demo --out DIRECTORY` left, with decoder2.

S clips, L layers, T frames, N tokens, P patches, C channels.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.head_training import Clips, Fold, Training, train
from benchmarks.support.machine import machine
from benchmarks.support.storage_variants import Coded, affine_tokens, compress, fp16, grouped_int4, sqrt_maps
from benchmarks.support.study_features import ut_interaction
from evl_cache.attention_maps import MapProjection, maps_from_tokens
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.towers import build_tower
from evl_cache.towers.backbone import map_projections

Encode = Callable[[Tensor], Coded]

INT8, UINT8 = partial(affine_tokens, difference=True), partial(sqrt_maps, bits=8)
LAYERS = (5, 6, 7, 8)
POINT = 3  # the label that is left out
FOLDS = 5
ZSTD_LEVEL = 1


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Features before they are stored: of every layer (S, T, N, C) and (S, 2, T-1, P, P), labels (S,)."""

    tokens: Mapping[int, Tensor]
    maps: Mapping[int, Tensor]
    labels: Tensor
    projections: Mapping[int, MapProjection]
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How tokens and maps are stored. maps: None: they are not."""

    tokens: Encode = INT8
    maps: Encode | None = UINT8
    recompute: bool = False


STORAGES: Mapping[str, Storage] = {
    "fp16 tokens, fp16 maps": Storage(tokens=fp16, maps=fp16),
    "int8 tokens, uint8 maps": Storage(),
    "tokens at 6 bits": Storage(tokens=partial(affine_tokens, bits=6, difference=True)),
    "tokens at 4 bits": Storage(tokens=partial(affine_tokens, bits=4, difference=True)),
    "tokens int4 in groups of 32": Storage(tokens=partial(grouped_int4, difference=True)),
    "maps at 4 bits": Storage(maps=partial(sqrt_maps, bits=4)),
    "maps recomputed": Storage(recompute=True),
    "no maps": Storage(maps=None),
}


def stored(exact: Exact, storage: Storage, layers: Sequence[int]) -> tuple[Clips, float]:
    """What a reader of the storage gets for a head's layers, and MB a sample after zstd."""
    nbytes = 0

    def coded(encode: Encode, values: Tensor) -> Tensor:
        nonlocal nbytes
        out = []
        for value in values:
            one = encode(value)
            nbytes += sum(map(len, compress(one, ZSTD_LEVEL)))
            out.append(one.value())
        return torch.stack(out)

    kept = [layers[0] - 1, *layers] if storage.recompute else list(layers)
    tokens = {layer: coded(storage.tokens, exact.tokens[layer]) for layer in kept}
    maps = None
    if storage.recompute:
        maps = [maps_from_tokens(tokens[x - 1], exact.projections[x]) for x in layers]
    elif storage.maps is not None:
        maps = [coded(storage.maps, exact.maps[layer]) for layer in layers]
    clips = Clips(tokens=[tokens[x] for x in layers], maps=maps, labels=exact.labels, grid=exact.grid)
    return clips, nbytes / 1e6 / len(exact.labels)


def compare(
    exact: Exact, folds: Sequence[Fold], *, layers: Sequence[int], training: Training, seeds: int
) -> dict[str, dict[str, float]]:
    """Every storage's figures: mean over seeds, and their deviation."""
    out = {}
    for name, storage in STORAGES.items():
        started = time.perf_counter()
        clips, mb = stored(exact, storage, layers)
        runs = [train(clips, folds, training=training, seed=seed) for seed in range(seeds)]
        out[name] = {"mb": mb, **_over_seeds(runs), "seconds": time.perf_counter() - started}
        print(name, {key: round(value, 3) for key, value in out[name].items()}, flush=True)
    return out


def _over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    out = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        out[key] = statistics.mean(values)
        out[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return out


def interactions() -> tuple[Exact, list[Fold]] | None:
    """Features of UT-Interaction's clips but "point", and folds; None where the clips are not at hand."""
    views = ViewSpec(frames=8, stride=8)
    found = ut_interaction(120, model="evl-tiny", layers=LAYERS, views=views)
    if found is None:
        return None
    names = [Path(name).stem.split("_") for name in found.names]  # <index>_<sequence>_<label>
    rows = [row for row, (_, _, label) in enumerate(names) if int(label) != POINT]
    labels = torch.tensor([int(names[row][2]) for row in rows])
    fold_of = torch.tensor([int(names[row][1]) % FOLDS for row in rows])
    side = int((found.tokens[0][LAYERS[0]].shape[1] - 1) ** 0.5)
    exact = Exact(
        tokens={x: torch.stack([found.tokens[row][x] for row in rows]) for x in found.tokens[0]},
        maps={x: torch.stack([found.maps[row][x] for row in rows]) for x in LAYERS},
        labels=labels,
        projections=found.projections,
        grid=(side, side),
    )
    every = torch.arange(len(rows))
    return exact, [Fold(train=every[fold_of != fold], val=every[fold_of == fold]) for fold in range(FOLDS)]


def rendered_motions(directory: Path) -> tuple[Exact, list[Fold]]:
    """What `evl-cache demo --out DIRECTORY` left: motions that only the maps and the order of frames tell."""
    caches = [FeatureCache(directory / "caches" / split) for split in ("train", "val")]
    spec = caches[0].spec
    read = [cache.read(range(len(cache)), spec.layers[-3:]) for cache in caches]
    visual, tower = build_tower(str(files("evl_cache") / "data" / "demo-tower.json"), "none")
    assert tower.weights_sha256 == spec.tower.weights_sha256
    maps = [part for _, part in read if part is not None]

    def joined(parts: Sequence[list[Tensor]]) -> dict[int, Tensor]:
        return {x: torch.cat([part[k] for part in parts]) for k, x in enumerate(spec.layers[-3:])}

    exact = Exact(
        tokens=joined([tokens for tokens, _ in read]),
        maps=joined(maps),
        labels=torch.cat([torch.from_numpy(cache.labels) for cache in caches]),
        projections=map_projections(
            visual, spec.layers[1:], compute_dtype=getattr(torch, spec.compute_dtype)
        ),
        grid=spec.tower.grid,
    )
    rows = torch.arange(len(exact.labels))
    return exact, [Fold(train=rows[: len(caches[0])], val=rows[len(caches[0]) :])]


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line for every storage."""
    lines = ["| | MB, zstd | top-1 | validation loss |", "|---|---|---|---|"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['mb']:.3f} | {row['top1']:.1f} ± {row['top1_deviation']:.1f} "
            f"| {row['val_loss']:.3f} ± {row['val_loss_deviation']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--table", action="store_true", help="also a markdown table")
    parser.add_argument(
        "--demo", type=Path, metavar="DIRECTORY", help="of `evl-cache demo --out` [UT-Interaction]"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if arguments.demo is not None:
        layers = FeatureCache(arguments.demo / "caches" / "train").spec.layers[-2:]
        training = Training(head="decoder2", epochs=arguments.epochs, batch=32, lr=2e-3, warmup_steps=75)
        source: tuple[Exact, list[Fold]] | None = rendered_motions(arguments.demo)
    else:
        layers, source = LAYERS, interactions()
        training = Training(head="decoder4", epochs=arguments.epochs, batch=8, lr=1e-3, warmup_steps=20)
    if source is not None:  # else the clips are not at hand
        result = compare(*source, layers=layers, training=training, seeds=arguments.seeds)
        if arguments.table:
            print(f"\n{table(result)}\n")
    setting = {"seeds": arguments.seeds, "epochs": arguments.epochs}
    print(json.dumps({"storages": result, **setting, "machine": machine()}))


if __name__ == "__main__":
    main()
