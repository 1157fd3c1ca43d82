"""Sixteen heads in one sweep against sixteen trainings: `python -m benchmarks.sweep --json`.

evl-tiny's features of *motions* (rendered and extracted first, or --cache and --val-cache). Printed: the largest
difference of a head's losses from those of its own training; what the sweep reads and decodes, from the first step to
the last validation, beside the one training that reads most; its time beside that of the sixteen, so and with what comes
before (planning, which measures each head's memory; opening; building). All in one process: neither side pays for
starting Python. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.support.counting import Work, counted
from benchmarks.support.machine import machine
from evl_cache import FeatureCache
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.request import ExtractRequest, extract_dataset
from evl_cache.rendered.benchmarks import RenderOptions, render
from evl_cache.spec import ViewSpec
from evl_cache.store import Reads
from evl_cache.sweep import RUNS_NAME, sweep
from evl_cache.sweep.grid import SweepRun, expand
from evl_cache.sweep.shared_pass import OnPassStep, SweepPass
from evl_cache.train.stage import train

SIXTEEN = (
    {"head": ["decoder4", "decoder2", "decoder1"], "temporal": ["all", "none", "conv"]},
    {"head": "decoder4", "temporal": "no-cross-attention"},
    {"head": ["linear", "meanpool", "attentive", "mlap", "uniformerv2", "ladder"]},
)


def motions_caches(folder: Path, *, train_clips: int, val_clips: int) -> tuple[FeatureCache, FeatureCache]:
    """Clips of each class, drawn and extracted with evl-tiny's last four blocks."""
    options = RenderOptions(clips_per_class={"train": train_clips, "val": val_clips})
    render("motions", folder / "clips", options=options)
    for split in ("train", "val"):
        request = ExtractRequest(
            dataset="folder",
            root=folder / "clips",
            split=split,
            model="evl-tiny",
            layers=(5, 6, 7, 8),
            views=ViewSpec(frames=8, stride=2),
            cache=folder / split,
        )
        for _ in extract_dataset(request, options=ExtractOptions()):
            pass
    return FeatureCache(folder / "train"), FeatureCache(folder / "val")


def losses(run: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def seconds_of(run: Path) -> float:
    """From the first step to the last validation; in a sweep, of the whole pass."""
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return float(found["seconds"])


@contextmanager
def planning(work: Work) -> Iterator[list[Work]]:
    """What had been counted when a pass began, by pass."""
    before: list[Work] = []
    run = SweepPass.run

    def noting(one_pass: SweepPass, on_step: OnPassStep) -> None:
        before.append(replace(work))
        run(one_pass, on_step)

    with mock.patch.object(SweepPass, "run", noting):
        yield before


def measure(caches: tuple[FeatureCache, FeatureCache], runs: list[SweepRun], folder: Path) -> dict[str, Any]:
    """Every figure, from one sweep and one training of each of its heads."""
    train(*caches, options=runs[0].options, out=folder / "warm-up")
    started = time.perf_counter()
    with counted() as together, planning(together) as before:
        result = sweep(*caches, runs=runs, out=folder / "sweep")
    swept = time.perf_counter() - started
    assert [row.status for row in result.runs] == ["done"] * len(runs) and len(result.passes) == 1
    read_by_sweep, decoded_by_sweep = together.read - before[0].read, together.decoded - before[0].decoded
    alone, read, decoded, own_seconds, differences = 0.0, [], [], 0.0, {}
    for run in runs:
        out, started = folder / "own" / run.name, time.perf_counter()
        with counted() as own:
            train(*caches, options=run.options, out=out)
        alone += time.perf_counter() - started
        own_seconds += seconds_of(out)
        read.append(own.read)
        decoded.append(own.decoded)
        pairs = zip(losses(out), losses(folder / "sweep" / RUNS_NAME / run.name), strict=True)
        differences[run.name] = max(abs(a - b) for a, b in pairs)
    # A linear head reads class tokens in full precision, which others do not; here it is one of the sixteen.
    probe = Reads(layers=caches[0].spec.layers, with_maps=False, tokens="class")
    samples = runs[0].options.epochs * sum(int(cache.is_valid.sum()) for cache in caches)
    class_tokens = samples * caches[0].buffers(slots=1, reads=probe).nbytes
    return {
        "heads": len(runs),
        "largest_loss_difference": max(differences.values()),
        "read_vs_one_run": read_by_sweep / max(read),
        "read_vs_one_run_without_class_tokens": (read_by_sweep - class_tokens) / max(read),
        "decoded_vs_one_run": decoded_by_sweep / max(decoded),
        "read_vs_all_runs": read_by_sweep / sum(read),
        "decoded_vs_all_runs": decoded_by_sweep / sum(decoded),
        "time_vs_all_runs": seconds_of(folder / "sweep" / RUNS_NAME / runs[0].name) / own_seconds,
        "time_vs_all_runs_with_planning": swept / alone,
        "seconds_sweep": swept,
        "seconds_runs": alone,
        "loss_differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--cache", help="[small rendered motions]")
    parser.add_argument("--val-cache")
    parser.add_argument("--train-clips", type=int, default=12, help="rendered ones, of each of 14 classes")
    parser.add_argument("--val-clips", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common = {name: getattr(arguments, name) for name in ("epochs", "batch")}
    runs = expand(SIXTEEN, {**common, "lr": 1e-3, "device": arguments.device})
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        if arguments.cache:
            caches = FeatureCache(arguments.cache), FeatureCache(arguments.val_cache or arguments.cache)
        else:
            sizes = {name: getattr(arguments, name) for name in ("train_clips", "val_clips")}
            caches = motions_caches(Path(scratch), **sizes)
        found = measure(caches, runs, Path(scratch))
    setting = {name: value for name, value in vars(arguments).items() if name != "json"}
    print(json.dumps({**found, "setting": setting, "machine": machine()}))


if __name__ == "__main__":
    main()
