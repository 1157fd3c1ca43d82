"""Bytes a sample against error and decoding time: `python -m benchmarks.rate_distortion --table`.

ViT-B/16, 8 frames, layers 8-12; generated features, and UT-Interaction's with random weights where it is at
hand. Bytes are those of zstd (level 1 as in the default profile) and without a codec. Errors are against float32:
the worst channel's relative L2 for tokens, total relative L2 for maps, and for both what a decoder4's logits do,
as a share of their deviation between clips. Decoding is one thread from compressed bytes to float32. What heads
trained on each reach is `benchmarks.rate_accuracy`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.outlier_features import worst_channel_error
from benchmarks.support.machine import machine
from benchmarks.support.storage_variants import (
    Coded,
    affine_tokens,
    compress,
    decompress,
    fp16,
    grouped_int4,
    sqrt_maps,
)
from benchmarks.support.stored_features import LAYERS
from benchmarks.support.study_features import StudyFeatures, generated, ut_interaction
from evl_cache.attention_maps import maps_from_tokens
from evl_cache.heads import EVLHead, build_head

TOKENS: Mapping[str, Callable[[Tensor], Coded]] = {
    "fp16": fp16,
    "int8": partial(affine_tokens, bits=8, difference=False),
    "int8, differences": partial(affine_tokens, bits=8, difference=True),
    "6 bits": partial(affine_tokens, bits=6, difference=False),
    "6 bits, differences": partial(affine_tokens, bits=6, difference=True),
    "4 bits": partial(affine_tokens, bits=4, difference=False),
    "4 bits, differences": partial(affine_tokens, bits=4, difference=True),
    "int4 in groups of 32": partial(grouped_int4, difference=False),
    "int4 in groups of 32, differences": partial(grouped_int4, difference=True),
}
MAPS: Mapping[str, Callable[[Tensor], Coded]] = {
    "fp16": fp16,
    "uint8": partial(sqrt_maps, bits=8),
    "4 bits": partial(sqrt_maps, bits=4),
}
ZSTD_LEVELS = (1, 3, 9, 12, 15, 17, 19)
DEFAULT_LEVEL = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--table", action="store_true", help="also a markdown table")
    parser.add_argument("--clips", type=int, default=4, help="of either kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    sources = [generated(arguments.clips), ut_interaction(arguments.clips)]
    for features in [source for source in sources if source is not None]:
        result[features.name] = study(features)
        if arguments.table:
            print(f"\n{features.name}\n\n{table(result[features.name])}\n")
    print(json.dumps({**result, "machine": machine()}))


def study(features: StudyFeatures) -> dict[str, Any]:
    """Every variant on the same features."""
    judge = Judge(features)
    tokens = {name: judge.tokens(encode) for name, encode in TOKENS.items()}
    maps = {name: judge.maps(encode) for name, encode in MAPS.items()}
    maps["recomputed"] = judge.recomputed_maps()
    maps["none"] = judge.no_maps()
    return {"tokens": tokens, "maps": maps, "zstd": zstd_levels(features)}


class Judge:
    """Bytes, errors and time of variants on one set of features."""

    def __init__(self, features: StudyFeatures) -> None:
        self.features = features
        self.head = _random_head()
        self.reference = self._logits(features.tokens, features.maps)

    def tokens(self, encode: Callable[[Tensor], Coded]) -> dict[str, float]:
        """A way of storing tokens; maps are exact."""
        out, decoded = self._coded([{x: clip[x] for x in LAYERS} for clip in self.features.tokens], encode)
        errors = [
            worst_channel_error(clip[layer], found[layer])
            for clip, found in zip(self.features.tokens, decoded, strict=True)
            for layer in LAYERS
        ]
        logits = self._logits(decoded, self.features.maps)
        return {**out, "error_percent": 100 * max(errors), "logit_percent": self._logit_error(logits)}

    def maps(self, encode: Callable[[Tensor], Coded]) -> dict[str, float]:
        """A way of storing maps; tokens are exact."""
        out, decoded = self._coded(self.features.maps, encode)
        return {**out, **self._map_errors(decoded)}

    def recomputed_maps(self) -> dict[str, float]:
        """Maps made from int8 tokens one block below: the bytes are those of layer 7's tokens."""
        below, out = [], {"raw_mb": 0.0, "mb": 0.0}
        count = len(self.features.tokens)
        for clip in self.features.tokens:
            coded = {layer: affine_tokens(value, difference=True) for layer, value in clip.items()}
            below.append({layer: one.value() for layer, one in coded.items()})
            first = coded[LAYERS[0] - 1]
            out["raw_mb"] += first.raw_nbytes / 1e6 / count
            out["mb"] += sum(map(len, compress(first, DEFAULT_LEVEL))) / 1e6 / count
        seconds, made = [], []
        for clip in below:
            started = time.perf_counter()
            made.append(
                {x: maps_from_tokens(clip[x - 1][None], self.features.projections[x])[0] for x in LAYERS}
            )
            seconds.append(time.perf_counter() - started)
        return {**out, "decode_ms": 1e3 * statistics.median(seconds), **self._map_errors(made)}

    def no_maps(self) -> dict[str, float]:
        """The head's motion switched off."""
        self.head.temporal_cross_attention = False
        logits = self._logits(self.features.tokens, self.features.maps)
        self.head.temporal_cross_attention = True
        error = {"error_percent": 100.0, "logit_percent": self._logit_error(logits)}
        return {"raw_mb": 0.0, "mb": 0.0, "decode_ms": 0.0, **error}

    def _coded(
        self, values: list[dict[int, Tensor]], encode: Callable[[Tensor], Coded]
    ) -> tuple[dict[str, float], list[dict[int, Tensor]]]:
        """Sizes and time a sample, and what a reader gets."""
        raw, stored, seconds = 0, 0, []
        decoded: list[dict[int, Tensor]] = []
        for clip in values:
            coded = {layer: encode(value) for layer, value in clip.items()}
            frames = {layer: compress(one, DEFAULT_LEVEL) for layer, one in coded.items()}
            raw += sum(one.raw_nbytes for one in coded.values())
            stored += sum(len(frame) for part in frames.values() for frame in part)
            started = time.perf_counter()
            decoded.append({x: one.decode(decompress(frames[x], one)) for x, one in coded.items()})
            seconds.append(time.perf_counter() - started)
        count = 1e6 * len(values)
        sizes = {"raw_mb": raw / count, "mb": stored / count, "decode_ms": 1e3 * statistics.median(seconds)}
        return sizes, decoded

    def _map_errors(self, decoded: list[dict[int, Tensor]]) -> dict[str, float]:
        errors = [
            float((found[layer] - clip[layer]).norm() / clip[layer].norm())
            for clip, found in zip(self.features.maps, decoded, strict=True)
            for layer in LAYERS
        ]
        logits = self._logits(self.features.tokens, decoded)
        return {"error_percent": 100 * max(errors), "logit_percent": self._logit_error(logits)}

    @torch.no_grad()
    def _logits(self, tokens: list[dict[int, Tensor]], maps: list[dict[int, Tensor]]) -> Tensor:
        layers = LAYERS[-4:]
        return torch.cat(
            [self.head([t[x][None] for x in layers], [m[x][None] for x in layers])
             for t, m in zip(tokens, maps, strict=True)]
        )  # fmt: skip

    def _logit_error(self, logits: Tensor) -> float:
        """Root mean square of the change, in percent of the logits' deviation between clips."""
        between = self.reference - self.reference.mean(0)
        return 100 * float((logits - self.reference).norm() / between.norm())


def _random_head() -> EVLHead:
    """A decoder4 for ViT-B/16 whose every parameter matters: what starts at zero is drawn too."""
    torch.manual_seed(0)
    head = build_head("decoder4", width=768, num_frames=8, grid=(14, 14), num_classes=16).eval()
    for name, parameter in head.named_parameters():
        if not bool(parameter.detach().any()) and "bias" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return head


def zstd_levels(features: StudyFeatures) -> dict[str, dict[str, float]]:
    """Megabytes and seconds a sample of tokens and maps at levels of zstd, one clip."""
    items = [affine_tokens(features.tokens[-1][layer], difference=True) for layer in LAYERS]
    items += [sqrt_maps(features.maps[-1][layer]) for layer in LAYERS]
    out = {}
    for level in ZSTD_LEVELS:
        started = time.perf_counter()
        frames = [compress(item, level) for item in items]
        seconds = time.perf_counter() - started
        out[str(level)] = {"mb": sum(len(f) for part in frames for f in part) / 1e6, "seconds": seconds}
    return out


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a line for every variant."""
    lines = ["| | MB, no codec | MB, zstd | error, % | logits, % | decode, ms |", "|---|---|---|---|---|---|"]
    for kind in ("tokens", "maps"):
        for name, row in found[kind].items():
            lines.append(
                f"| {kind}: {name} | {row['raw_mb']:.2f} | {row['mb']:.2f} | {row['error_percent']:.2f} "
                f"| {row['logit_percent']:.2f} | {row['decode_ms']:.0f} |"
            )
    lines += ["", "| zstd level | MB, tokens and maps | s a sample |", "|---|---|---|"]
    lines += [f"| {level} | {row['mb']:.3f} | {row['seconds']:.2f} |" for level, row in found["zstd"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
