"""What caching changes: cached augmented views against --online: `python -m benchmarks.augmented_views --root R --json`.

The root holds train/<class>/<video> and val/<class>/<video>. For each number of cached views, and live (--online: a
newly drawn view of each clip in every epoch), the same head is trained for as many steps; "centre" is one centre view
without augmentation. The last line is one JSON object: accuracies by seed, seconds and bytes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from evl_cache import FeatureCache
from evl_cache.extract import ExtractOptions
from evl_cache.extract_dataset import ExtractRequest, extract_dataset
from evl_cache.online import train_online
from evl_cache.spec import ViewSpec, parse_layers
from evl_cache.train import train
from evl_cache.train_options import TrainOptions

Quiet = nullcontext((lambda failed: None, lambda name: None))


def request_of(arguments: argparse.Namespace, views: int) -> ExtractRequest:
    """Of a number of augmented training views; 0: the centre view."""
    one = ViewSpec(frames=arguments.frames, stride=arguments.stride)
    return ExtractRequest(
        dataset="folder",
        root=arguments.root,
        model=arguments.model,
        pretrained=arguments.pretrained,
        layers=parse_layers(arguments.layers),
        views=one,
        train_split_views=replace(one, train_views=views) if views else None,
    )


def extract_views(arguments: argparse.Namespace, views: int) -> tuple[dict[str, FeatureCache], float, int]:
    """Caches by split, seconds and bytes of the training one."""
    request, caches, started = request_of(arguments, views), {}, time.perf_counter()
    for split in ("train", "val"):
        folder = arguments.out / ("val" if split == "val" else f"train-{views}-views")
        wanted = replace(request, split=split, cache=folder)
        if split == "val":
            wanted = replace(wanted, train_split_views=None)
        for _ in extract_dataset(
            wanted, options=ExtractOptions(), progress=lambda spec: Quiet, on_plan=lambda *_: None
        ):
            caches[split] = FeatureCache(folder)
        if split == "train":
            seconds = time.perf_counter() - started
    nbytes = sum(p.stat().st_size for p in caches["train"].path.rglob("*") if p.is_file())
    return caches, seconds, nbytes


def measure(arguments: argparse.Namespace, views: int | None) -> dict[str, Any]:
    """Mean, deviation, seconds and bytes; views None: live."""
    seconds, nbytes, caches = 0.0, 0, {}
    if views is not None:
        caches, seconds, nbytes = extract_views(arguments, views)
    scores, losses, trained = [], [], 0.0
    for seed in range(arguments.seeds if views is not None else arguments.online_seeds):
        options = options_of(arguments, seed)
        out = arguments.out / "runs" / f"{'online' if views is None else views}-{seed}"
        if not (out / "result.json").exists():
            if views is None:
                train_online(request_of(arguments, options.epochs or 1), options=options, out=out, workers=1)
            else:
                train(caches["train"], caches["val"], options=replace(options, keep_in="ram"), out=out)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        scores.append(result["top1"])
        losses.append(last["val_loss"])
        trained += result["seconds"]
    return {
        "top1": round(statistics.mean(scores), 1),
        "deviation": round(statistics.stdev(scores), 1) if len(scores) > 1 else None,
        "scores": [round(score, 1) for score in scores],
        "val_loss": round(statistics.mean(losses), 3),
        "extract_seconds": round(seconds, 1),
        "train_seconds": round(trained / len(scores), 1),
        "train_bytes": nbytes,
    }


def options_of(arguments: argparse.Namespace, seed: int) -> TrainOptions:
    names = ("head", "epochs", "batch", "lr", "warmup_steps")
    return TrainOptions(**{name: getattr(arguments, name) for name in names}, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of caches and runs; finished ones are kept"
    )
    parser.add_argument("--model", default="evl-tiny")
    parser.add_argument("--pretrained")
    parser.add_argument("--layers", default="5-8")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--views", type=int, nargs="*", default=[0, 1, 2, 4, 8], help="0: the centre view")
    parser.add_argument("--head", default="decoder4")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--online-seeds", type=int, default=1, help="0 leaves --online out")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides: Mapping[str, int | None] = {("centre" if v == 0 else f"{v} views"): v for v in arguments.views}
    table = {}
    for name, views in {**sides, **({"online": None} if arguments.online_seeds else {})}.items():
        table[name] = measure(arguments, views)
        print(f"{name:10} {table[name]}", flush=True)
    setting = {key: value for key, value in vars(arguments).items() if key != "json"}
    print(json.dumps({"table": table, "setting": setting, "machine": machine()}, default=str))


if __name__ == "__main__":
    main()
