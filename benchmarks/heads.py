"""Every head on the same caches, several seeds, by sweeps: `python -m benchmarks.heads --pair motions T V --json`.

Accuracy (mean and deviation over seeds, percent), parameters, time of a training step without reading and decoding,
and memory at the batch: of parameters, gradients and moments by their number, and what a first step takes in all,
measured in a process of its own. With `--folds`, one cache whose groups of clips go to folds: heads are trained on
all but one, and the accuracy of a seed is that over all folds' clips. Heads of one kind share a sweep; finished ones
are kept under --out: a stopped study goes on. The last line is one JSON object.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.paper_tables import SEQUENCE, Part, folds
from benchmarks.support.machine import machine
from evl_cache import FeatureCache
from evl_cache.processes.memory import peak_bytes, reset_peak
from evl_cache.sweep import SWEEP_NAME, sweep
from evl_cache.sweep.grid import SweepRun, expand
from evl_cache.train.batch_size import training_step
from evl_cache.train.head_reads import training_reads
from evl_cache.train.options import TrainOptions
from evl_cache.train.setup import run_config

# Pooling heads without attention want a higher rate; one for each kind, not chosen by results here.
GRIDS: Sequence[Mapping[str, Any]] = (
    {"head": "decoder4", "temporal": ["all", "none"], "lr": 1e-3},
    {"head": ["attentive", "mlap", "uniformerv2", "ladder"], "lr": 1e-3},
    {"head": ["linear", "meanpool"], "lr": 1e-2},
)


def trained(
    caches: tuple[FeatureCache, FeatureCache], runs: Sequence[SweepRun], part: Part, out: Path
) -> dict[str, dict[str, float]]:
    """Figures of every run, by name, from a sweep for each kind of head. part: the clips to train and to score on."""
    figures = {}
    for head in dict.fromkeys(run.options.head for run in runs):
        together = [run for run in runs if run.options.head == head]
        result = sweep(
            *caches,
            runs=together,
            out=out / head,
            train_clips=part.train,
            val_clips=part.val,
            resume=(out / head / SWEEP_NAME).exists(),
        )
        failed = [row.name for row in result.runs if row.status != "done"]
        assert not failed, failed
        for row in result.runs:
            figures[row.name] = {
                "top1": row.top1 or 0.0,
                "ms_per_step": row.ms_per_step or 0.0,
                "parameters": row.parameters or 0,
            }
    return figures


def over_folds(
    cache: FeatureCache, runs: Sequence[SweepRun], parts: Sequence[Part], out: Path
) -> dict[str, dict[str, float]]:
    """Figures of every run: top-1 over the clips of all folds, each scored by a head trained without its fold."""
    clips = sum(len(part.val or ()) for part in parts)
    total: dict[str, dict[str, float]] = {}
    for number, part in enumerate(parts):
        for name, figures in trained((cache, cache), runs, part, out / f"fold-{number}").items():
            row = total.setdefault(name, {**figures, "top1": 0.0})
            row["top1"] += figures["top1"] * len(part.val or ()) / clips
    return total


def step_nbytes(path: Path, options: TrainOptions) -> int | None:
    """How much the peak grows in a head's second step; None where the system does not tell. In a fresh process:
    an old one has freed memory at hand."""
    cache = FeatureCache(path)
    reads = training_reads(options, cache.spec)
    probe = cache.read_stored([int(cache.is_valid.argmax())], reads)
    config = run_config(cache, {}, options, reads.layers)
    training_step(config.build(), probe, options, batch=1)  # libraries loaded
    if not reset_peak():
        return None
    before = peak_bytes()
    training_step(config.build(), probe, options, batch=options.global_batch)
    return peak_bytes() - before


def table(
    cache: FeatureCache, runs: Sequence[SweepRun], found: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Mean and deviation over seeds of every head, with its memory."""
    rows: dict[str, Any] = {}
    for group in dict.fromkeys(run.group for run in runs):
        members = [run for run in runs if run.group == group]
        top1 = [found[run.name]["top1"] for run in members]
        reads, options = training_reads(members[0].options, cache.spec), members[0].options
        # Spawned: a process that has threads must not be forked.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            nbytes = fresh.submit(step_nbytes, cache.path, options).result()
        parameters = found[members[0].name]["parameters"]
        rows[group] = {
            "top1": statistics.mean(top1),
            "deviation": statistics.stdev(top1) if len(top1) > 1 else 0.0,
            "scores": top1,
            "parameters": parameters,
            "ms_per_step": statistics.mean(found[run.name]["ms_per_step"] for run in members),
            "state_mb": 4 * 4 * parameters / 1e6,
            "step_mb": None if nbytes is None else nbytes / 1e6,
            "read_kb_per_sample": cache.buffers(slots=1, reads=reads).nbytes / 1e3,
        }
    return rows


def show(name: str, rows: Mapping[str, Any]) -> None:
    """As a table for docs/results.md."""
    print(
        f"\n{name}\n\n| head | top-1 | parameters | ms a step | MB always | MB in a step | kB read a sample |"
    )
    print("|---|---|---|---|---|---|---|")
    for group, row in sorted(rows.items(), key=lambda item: -item[1]["top1"]):
        print(
            f"| {group} | {row['top1']:.1f} ± {row['deviation']:.1f} | {row['parameters'] / 1e6:.2f} M | "
            f"{row['ms_per_step']:.0f} | {row['state_mb']:.1f} | {row['step_mb'] or 0:.0f} | {row['read_kb_per_sample']:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--pair", nargs=3, action="append", default=[], metavar=("NAME", "TRAIN", "VAL"))
    parser.add_argument("--folds", nargs=2, action="append", default=[], metavar=("NAME", "CACHE"))
    parser.add_argument(
        "--group", default=SEQUENCE, help="regular expression: its first group names a clip's group"
    )
    parser.add_argument("--fold-count", type=int, default=5)
    parser.add_argument("--leave-out", type=int, nargs="*", default=[], metavar="LABEL", help="of --folds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweeps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="*", help="heads, such as linear [all]")
    arguments = parser.parse_args()
    common = {"epochs": arguments.epochs, "batch": arguments.batch, "warmup_steps": 10, "keep_in": "ram"}
    runs = expand([{**grid, "seed": list(range(arguments.seeds))} for grid in GRIDS], common)
    runs = [run for run in runs if not arguments.only or run.options.head in arguments.only]
    tables: dict[str, Any] = {}
    for name, train, val in arguments.pair:
        caches = FeatureCache(train), FeatureCache(val)
        tables[name] = table(caches[0], runs, trained(caches, runs, Part(), arguments.out / name))
        show(name, tables[name])
    for name, path in arguments.folds:
        cache = FeatureCache(path)
        parts = folds(
            cache,
            count=arguments.fold_count,
            group=arguments.group,
            leave_out=tuple(arguments.leave_out),
        )
        tables[name] = table(cache, runs, over_folds(cache, runs, parts, arguments.out / name))
        show(name, tables[name])
    setting = {key: value for key, value in vars(arguments).items() if key not in ("json", "pair", "folds")}
    print(json.dumps({"heads": tables, "setting": setting, "machine": machine()}, default=str))


if __name__ == "__main__":
    main()
