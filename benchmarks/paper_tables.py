"""The paper's tables 3 and 4 from one extraction: `python -m benchmarks.paper_tables --cache C [--val-cache V] --json`.

What is read (class tokens or unpooled ones, one layer or several, decoders of 1, 2 and 4 layers) and what each
temporal module adds, over several seeds. Without --val-cache: folds over groups of clips (UT-Interaction's sequences),
each trained on the others; a seed's accuracy is then that over all folds' clips. Finished runs are kept under --out:
a stopped study goes on. The last line is one JSON object.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.machine import machine
from evl_cache import FeatureCache
from evl_cache.errors import UsageError
from evl_cache.heads import MODULES
from evl_cache.train.options import TrainOptions
from evl_cache.train.stage import train

NONE = dict.fromkeys(MODULES, False)
# Layers counted from the last cached one, which is 0: the deeper ones of four in (3, 2, 1, 0) come last.
TABLE_3: Mapping[str, Mapping[str, Any]] = {
    "class token, last layer": {"head": "linear"},
    "class tokens, four layers": {"head": "linear", "from_last": (3, 2, 1, 0)},
    "unpooled, decoder 1": {"head": "decoder1"},
    "unpooled, decoder 2": {"head": "decoder2"},
    "unpooled, decoder 4": {"head": "decoder4"},
    "unpooled, decoder 4 on the last layer": {"head": "decoder4", "from_last": (0, 0, 0, 0)},
}
TABLE_4: Mapping[str, Mapping[str, Any]] = {
    "no temporal module": {"head": "decoder4", **NONE},
    "convolution alone": {"head": "decoder4", **NONE, "temporal_conv": True},
    "position embedding alone": {"head": "decoder4", **NONE, "temporal_pos_embed": True},
    "maps alone": {"head": "decoder4", **NONE, "temporal_cross_attention": True},
}  # all three: decoder 4 of table 3
ROWS = {**TABLE_3, **TABLE_4}
# UT-Interaction's names are <index>_<sequence>_<label>.avi.
SEQUENCE = r"(?:^|/)\d+_(\d+)_\d+\.avi$"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Clips to train on and clips to score on; None: all."""

    train: list[int] | None = None
    val: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """What every run has in common."""

    cache: Path
    val_cache: Path
    parts: Sequence[Part]
    out: Path
    epochs: int
    batch: int
    lr: float
    warmup_steps: int


def folds(cache: FeatureCache, *, count: int, group: str, leave_out: tuple[int, ...]) -> list[Part]:
    """Groups of clips go to the folds in turn. Clips of left-out labels are in none."""
    rows: list[list[int]] = [[] for _ in range(count)]
    numbers: dict[str, int] = {}
    for row, clip in enumerate(cache.clips):
        if clip.label in leave_out:
            continue
        found = re.search(group, clip.path)
        if found is None:
            raise UsageError(f"{clip.path}: has no group by {group!r}; give another --group")
        rows[numbers.setdefault(found[1], len(numbers)) % count].append(row)
    return [
        Part(train=[row for other in rows if other is not held_out for row in other], val=held_out)
        for held_out in rows
    ]


def run(study: Study, row: str, seed: int) -> dict[str, Any]:
    """Accuracy, in percent over all parts' validation clips, and seconds; from the runs on the disk where they are."""
    torch.set_num_threads(1)
    caches = FeatureCache(study.cache), FeatureCache(study.val_cache)
    settings = dict(ROWS[row])
    layers = caches[0].spec.layers
    from_last = settings.pop("from_last", None)
    options = TrainOptions(
        **settings,
        head_layers=None if from_last is None else tuple(layers[-1 - n] for n in from_last),
        epochs=study.epochs,
        batch=study.batch,
        lr=study.lr,
        warmup_steps=study.warmup_steps,
        seed=seed,
        keep_in="ram",
    )
    correct, clips, seconds = 0.0, 0, 0.0
    for number, part in enumerate(study.parts):
        out = study.out / f"{row.replace(', ', '-').replace(' ', '-')}-{seed}-{number}"
        result = out / "result.json"
        if not result.exists():
            train(
                *caches,
                options=options,
                out=out,
                train_clips=part.train,
                val_clips=part.val,
                resume=out.exists(),
            )
        found = json.loads(result.read_text(encoding="utf-8"))
        correct += found["top1"] * found["val_clips"] / 100
        clips += found["val_clips"]
        seconds += found["seconds"]
    return {"top1": 100 * correct / clips, "clips": clips, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--val-cache", type=Path, help="[folds of --cache]")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--group", default=SEQUENCE, help="its first group names a clip's group")
    parser.add_argument("--leave-out", type=int, nargs="*", default=[], metavar="LABEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), metavar="ROW", help="[all]")
    arguments = parser.parse_args()
    started = time.perf_counter()
    cache = FeatureCache(arguments.cache)
    parts = [Part()]
    if arguments.val_cache is None:
        parts = folds(
            cache, count=arguments.folds, group=arguments.group, leave_out=tuple(arguments.leave_out)
        )
    study = Study(
        cache=arguments.cache,
        val_cache=arguments.val_cache or arguments.cache,
        parts=parts,
        **{name: getattr(arguments, name) for name in ("out", "epochs", "batch", "lr", "warmup_steps")},
    )
    table = {}
    # Spawned: a process that has threads must not be forked.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            row: [pool.submit(run, study, row, seed) for seed in range(arguments.seeds)]
            for row in arguments.only or ROWS
        }
        for row, futures in jobs.items():
            results = [future.result() for future in futures]
            table[row] = summary(results)
            print(f"{row:40} {table[row]}", flush=True)
    setting = {name: value for name, value in vars(arguments).items() if name not in ("json", "only")}
    stored = sum(path.stat().st_size for path in cache.path.rglob("*") if path.is_file())
    facts = {
        "train_bytes": stored,
        "tower": f"{cache.spec.tower.model} ({cache.spec.tower.pretrained})",
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps({"top1": table, **facts, "setting": setting, "machine": machine()}, default=str))


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds."""
    scores = [result["top1"] for result in results]
    return {
        "mean": round(statistics.mean(scores), 1),
        "deviation": round(statistics.stdev(scores), 1) if len(scores) > 1 else 0.0,
        "scores": [round(score, 1) for score in scores],
        "clips": results[0]["clips"],
        "seconds_per_seed": round(statistics.mean(result["seconds"] for result in results), 1),
    }


if __name__ == "__main__":
    main()
