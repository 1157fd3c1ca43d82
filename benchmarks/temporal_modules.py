"""What each temporal module adds, from one extraction: `python -m benchmarks.temporal_modules --cache C --json`.

Folds over groups of clips (UT-Interaction's sequences by default), several seeds; each configuration is trained on
all folds but one and scored on the one left out, and the accuracy of a seed is that over all folds' clips. The last
line is one JSON object: mean and standard deviation over seeds, in percent, by configuration.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from evl_cache import FeatureCache
from evl_cache.errors import UsageError
from evl_cache.train import train
from evl_cache.train_options import TrainOptions

MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")
CONFIGURATIONS: Mapping[str, Mapping[str, bool]] = {
    "all": {},
    **{f"without {name}": {name: False} for name in MODULES},
    **{f"only {name}": {other: other == name for other in MODULES} for name in MODULES},
    "none": dict.fromkeys(MODULES, False),
}
# UT-Interaction's names are <index>_<sequence>_<label>.avi.
SEQUENCE = r"(?:^|/)\d+_(\d+)_\d+\.avi$"


def folds(cache: FeatureCache, *, count: int, group: str, leave_out: tuple[int, ...]) -> list[np.ndarray]:
    """Rows of the clips of each fold: groups go to the folds in turn. Clips of left-out labels are in none."""
    rows: list[list[int]] = [[] for _ in range(count)]
    numbers: dict[str, int] = {}
    for row, clip in enumerate(cache.clips):
        if clip.label in leave_out:
            continue
        found = re.search(group, clip.path)
        if found is None:
            raise UsageError(f"{clip.path}: has no group by {group!r}; give another --group")
        number = numbers.setdefault(found[1], len(numbers))
        rows[number % count].append(row)
    return [np.asarray(fold) for fold in rows]


def accuracy(
    cache: FeatureCache,
    parts: list[np.ndarray],
    *,
    switches: Mapping[str, bool],
    seed: int,
    options: TrainOptions,
) -> float:
    """Percent of all folds' clips that the head trained without their fold gets right."""
    correct = 0.0
    for number, held_out in enumerate(parts):
        rest = np.concatenate([part for other, part in enumerate(parts) if other != number])
        with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
            result = train(
                cache,
                cache,
                options=TrainOptions(**{**vars(options), **switches, "seed": seed}),
                out=Path(scratch) / "run",
                train_clips=rest.tolist(),
                val_clips=held_out.tolist(),
            )
        correct += result.top1 * len(held_out) / 100
    return 100 * correct / sum(len(part) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--head", default="decoder4")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--group", default=SEQUENCE, help="regular expression whose first group names a clip's group"
    )
    parser.add_argument("--leave-out", type=int, nargs="*", default=[], metavar="LABEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument(
        "--only", nargs="*", choices=list(CONFIGURATIONS), help="configurations [all of them]"
    )
    arguments = parser.parse_args()
    cache = FeatureCache(arguments.cache)
    parts = folds(cache, count=arguments.folds, group=arguments.group, leave_out=tuple(arguments.leave_out))
    options = TrainOptions(
        head=arguments.head, epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr, keep_in="ram"
    )
    table = {}
    for name in arguments.only or CONFIGURATIONS:
        started = time.perf_counter()
        scores = [
            accuracy(cache, parts, switches=CONFIGURATIONS[name], seed=seed, options=options)
            for seed in range(arguments.seeds)
        ]
        deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
        table[name] = {"mean": statistics.mean(scores), "deviation": deviation, "scores": scores}
        print(f"{name}: {table[name]} {time.perf_counter() - started:.0f} s", flush=True)
    setting = {key: value for key, value in vars(arguments).items() if key not in ("json", "cache", "only")}
    clips = sum(len(part) for part in parts)
    print(json.dumps({"top1": table, "clips": clips, "setting": setting, "machine": machine()}))


if __name__ == "__main__":
    main()
