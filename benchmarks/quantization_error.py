"""What storage loses: `python -m benchmarks.quantization_error --json`.

On generated features with CLIP-like outliers (`benchmarks.outlier_features`), and on features of real clips
where UT-Interaction is at hand (ViT-B/16 with random weights). Tokens by their worst channel, maps in total.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.outlier_features import measure, worst_channel_error
from evl_cache.clips import Clip
from evl_cache.extract.prepare import prepare_clip
from evl_cache.quantize import dequantize_maps, dequantize_tokens, quantize_maps, quantize_tokens
from evl_cache.spec import ViewSpec
from evl_cache.towers import build_tower
from evl_cache.towers.backbone import Backbone
from evl_cache.video.pool import DecodePool

LAYERS = (8, 9, 10, 11, 12)
VARIABLE = "EVL_UT_INTERACTION"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=6)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"generated": measure(clips=2, seed=0)}
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "ut_interaction"
    root = Path(os.environ.get(VARIABLE) or default)
    result["ut_interaction"] = (
        real_clips(root, arguments.clips) if root.is_dir() else f"no clips; set {VARIABLE}"
    )
    print(json.dumps(result))


def real_clips(root: Path, count: int) -> dict[str, float]:
    """Worst errors, in percent, over clips spread over the data set."""
    visual, tower = build_tower("ViT-B-16-quickgelu", "none")
    backbone = Backbone(visual, LAYERS)
    videos = sorted(root.rglob("*.avi"))
    token_error = map_error = 0.0
    clips = [
        Clip(id=video.name, path=str(video), label=0, split="all")
        for video in videos[:: max(1, len(videos) // count)][:count]
    ]
    with DecodePool(1) as pool:
        every = [
            prepare_clip(clip, root, tower=tower, views=ViewSpec(), decode=pool.frames) for clip in clips
        ]
    for prepared in every:
        assert prepared.samples is not None, prepared.record.error
        features = backbone(prepared.samples)
        tokens = torch.stack([features.tokens[layer][0] for layer in LAYERS])
        stored = quantize_tokens(tokens)
        decoded = dequantize_tokens(stored.codes, stored.affine, stored.scale)
        token_error = max(token_error, worst_channel_error(tokens, decoded))
        maps = torch.stack([features.maps[layer][0] for layer in LAYERS])
        coded = quantize_maps(maps)
        error = (dequantize_maps(coded.codes, coded.row_max) - maps).norm() / maps.norm()
        map_error = max(map_error, float(error))
    return {"tokens_worst_channel_percent": 100 * token_error, "maps_percent": 100 * map_error}


if __name__ == "__main__":
    main()
