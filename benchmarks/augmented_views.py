"""What caching changes: cached augmented views against --online: `python -m benchmarks.augmented_views --root R --json`.

A root holds train/<class>/<video> and val/<class>/<video>; several roots are folds, and a seed's accuracy is that over
the validation clips of all. For each number of cached views, and live (--online: a newly drawn view of each clip in
every epoch), the same head is trained for as many steps; "centre" is one centre view without augmentation. A cache of
as many views as there are epochs serves the very views that --online draws. What is finished is kept under --out.
The last line is one JSON object: accuracies by seed, seconds and bytes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.machine import machine
from evl_cache import FeatureCache
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.request import ExtractRequest, extract_dataset
from evl_cache.live.train import train_online
from evl_cache.notation import parse_layers
from evl_cache.spec import ViewSpec
from evl_cache.train.options import TrainOptions
from evl_cache.train.stage import train


def request_of(arguments: argparse.Namespace, root: Path, views: int) -> ExtractRequest:
    """Of a number of augmented training views; 0: the centre view."""
    one = ViewSpec(frames=arguments.frames, stride=arguments.stride)
    return ExtractRequest(
        dataset="folder",
        root=root,
        model=arguments.model,
        pretrained=arguments.pretrained,
        layers=parse_layers(arguments.layers),
        views=one,
        train_split_views=replace(one, train_views=views) if views else None,
    )


def extracted(
    arguments: argparse.Namespace, root: Path, views: int
) -> tuple[FeatureCache, FeatureCache, float]:
    """Train and validation caches, and seconds that the first took."""
    request, folder = request_of(arguments, root, views), arguments.out / root.name
    caches, note = {}, folder / f"train-{views}-views.json"
    for split in ("train", "val"):
        path = folder / ("val" if split == "val" else f"train-{views}-views")
        wanted, started = replace(request, split=split, cache=path), time.perf_counter()
        if split == "val":
            wanted = replace(wanted, train_split_views=None)
        for _ in extract_dataset(wanted, options=ExtractOptions()):
            caches[split] = FeatureCache(path)
        if split == "train" and not note.exists():
            note.write_text(json.dumps(time.perf_counter() - started), encoding="utf-8")
    return caches["train"], caches["val"], json.loads(note.read_text(encoding="utf-8"))


def trained(arguments: argparse.Namespace, root: Path, views: int | None, seed: int) -> dict[str, float]:
    """Clips that are right and clips, loss and seconds of one run; views None: live."""
    options = options_of(arguments, seed)
    out = arguments.out / root.name / "runs" / f"{'online' if views is None else views}-{seed}"
    if not (out / "result.json").exists():
        if views is None:
            train_online(
                request_of(arguments, root, arguments.epochs),
                options=options,
                out=out,
                workers=1,
                resume=out.exists(),
            )
        else:
            train_cache, val_cache, _ = extracted(arguments, root, views)
            options = replace(options, keep_in="ram")
            train(train_cache, val_cache, options=options, out=out, resume=out.exists())
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    clips = result["val_clips"]
    return {
        "right": result["top1"] / 100 * clips,
        "clips": clips,
        "loss": last["val_loss"] * clips,
        "seconds": result["seconds"],
    }


def measure(arguments: argparse.Namespace, views: int | None) -> dict[str, Any]:
    """Mean, deviation, seconds and bytes over all roots; views None: live."""
    seconds, nbytes = 0.0, 0
    for root in arguments.root if views is not None else ():
        cache, _, took = extracted(arguments, root, views or 0)
        seconds += took
        nbytes += sum(p.stat().st_size for p in cache.path.rglob("*") if p.is_file())
    seeds = range(arguments.seeds if views is not None else arguments.online_seeds)
    runs = [[trained(arguments, root, views, seed) for root in arguments.root] for seed in seeds]
    clips = sum(run["clips"] for run in runs[0])
    scores = [100 * sum(run["right"] for run in of_seed) / clips for of_seed in runs]
    losses = [sum(run["loss"] for run in of_seed) / clips for of_seed in runs]
    trained_s = [sum(run["seconds"] for run in of_seed) for of_seed in runs]
    return {
        "top1": round(statistics.mean(scores), 1),
        "deviation": round(statistics.stdev(scores), 1) if len(scores) > 1 else None,
        "scores": [round(score, 1) for score in scores],
        "val_loss": round(statistics.mean(losses), 3),
        "val_clips": clips,
        "extract_seconds": round(seconds, 1),
        "train_seconds": round(statistics.mean(trained_s), 1),
        "train_bytes": nbytes,
    }


def options_of(arguments: argparse.Namespace, seed: int) -> TrainOptions:
    names = ("head", "epochs", "batch", "lr", "warmup_steps")
    return TrainOptions(**{name: getattr(arguments, name) for name in names}, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--root", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of caches and runs; finished ones are kept"
    )
    parser.add_argument("--model", default="evl-tiny")
    parser.add_argument("--pretrained")
    parser.add_argument("--layers", default="5-8")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument(
        "--views", type=int, nargs="*", default=[0, 1, 2, 4, 8, 16], help="0: the centre view"
    )
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
