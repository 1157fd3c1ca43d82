"""Extraction from decoded frames, in five parts: `python -m benchmarks.extract --json`.

Frames are in memory, 8 of a sample; the last five layers of ViT-B/16 with random weights, with maps.

- `bare`: against the tower's own forward pass over the same frames in the same batches (`vs_bare_forward`). Ours makes
  maps, quantises, compresses, writes, syncs and marks as well, of two blocks at least.
- `written`: samples a second with a stub in the tower's place, whose features were made once and cost nothing: what
  stage one writes where nothing else limits it (`samples_per_s_written` in the default profile, `…_raw` without
  compression). Processor time a sample is told too: other work on the computer changes it less.
- `ranks`: the same by several processes on one cache, as torchrun starts them, together (`--ranks N`); on a GPU with
  the tower, too.
- `estimate`: what `estimate --cluster` gives for this machine, from costs of a core that are measured here, each alone
  (rows, compression, appending), against what was measured: the share of the prediction that is reached.
- `padding`: processor time of a block of 64 samples in batches of 64, 128 and 256, with a small tower.

`--device cuda` is stage one behind the decoder, in float16.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.core_costs import core_costs, predicted_rate, rows_ms
from benchmarks.support.machine import interleaved_seconds, machine, medians
from benchmarks.support.memory_extraction import (
    StubTower,
    Written,
    begin,
    blocks_written,
    frames_at_hand,
    frames_of,
    memory_job,
)
from evl_cache.extract.defaults import batch_for
from evl_cache.extract.job import ExtractOptions
from evl_cache.towers import Tower, build_tower

PARTS = ("bare", "written", "estimate", "ranks", "padding")
BLOCK = 64
CPU_BATCH, GPU_BATCH = 8, 32  # as `extract` has them for these towers
PADDED = (64, 128, 256)
_CODECS = {"default": "samples_per_s_written", "raw": "samples_per_s_written_raw"}
_START_TIMEOUT_S = 300.0


def main() -> None:
    arguments = parsed(sys.argv[1:])
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        measure = {"bare": bare, "written": written, "ranks": ranks, "padding": padding}
        for part in arguments.parts:
            result |= (
                estimate(arguments, Path(scratch), result)
                if part == "estimate"
                else measure[part](arguments, Path(scratch))
            )
            print(json.dumps(result), file=sys.stderr, flush=True)
    told = ("clips", "blocks", "batch", "rounds", "device", "compute_dtype", "decode_workers")
    named = {name: getattr(arguments, name) for name in told}
    if arguments.is_gpu:
        named["card"] = torch.cuda.get_device_name()
    print(json.dumps({**result, **named, "machine": machine()}))


def parsed(words: list[str]) -> argparse.Namespace:
    """The command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--parts", type=_parts, help=f"of {', '.join(PARTS)} [bare,written; and ranks]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N")
    parser.add_argument("--compute-dtype", help="[float16 on a GPU]")
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="of `bare`, and of `ranks` on a GPU")
    parser.add_argument("--clips", type=int, help="of `bare` [16; 512 on a GPU]")
    parser.add_argument(
        "--blocks", type=int, help=f"of {BLOCK} samples, of `written` and `ranks` [3; 8 on a GPU]"
    )
    parser.add_argument("--batch", type=int, help="samples of a forward pass [as `extract` has it]")
    parser.add_argument("--decode-workers", type=int, help="and threads that compress [as `extract` has it]")
    parser.add_argument("--ranks", type=int, default=1, help="processes of `ranks`")
    parser.add_argument("--small-model", default="evl-tiny", help="of `padding`")
    parser.add_argument("--rounds", type=int, default=3)
    found = parser.parse_args(words)
    found.is_gpu = torch.device(found.device).type == "cuda"
    found.parts = found.parts or (["bare", "written"] + ["ranks"] * (found.ranks > 1))
    found.compute_dtype = found.compute_dtype or ("float16" if found.is_gpu else "float32")
    found.clips = found.clips or (512 if found.is_gpu else 16)
    found.blocks = found.blocks or (8 if found.is_gpu else 3)
    found.batch = found.batch or (GPU_BATCH if found.is_gpu else CPU_BATCH)
    return found


def _parts(text: str) -> list[str]:
    named = text.split(",")
    if "estimate" in named:  # is of what `written` measures
        named = ["written", *(name for name in named if name not in ("written", "estimate")), "estimate"]
    if unknown := set(named) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    return named


def options_of(arguments: argparse.Namespace, *, device: str = "", batch: int = 0) -> ExtractOptions:
    """Options as `extract` has them where none are named."""
    given: dict[str, Any] = {}
    if arguments.decode_workers:
        given["decode_workers"] = arguments.decode_workers
    return ExtractOptions(device=device or arguments.device, batch=batch or arguments.batch, **given)


def _after(arguments: argparse.Namespace) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(arguments.device)) if arguments.is_gpu else lambda: None


def bare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Stage one behind the decoder, from the first block to the last mark, against the forward pass alone, in turns."""
    tower = build_tower(arguments.model, "none")
    dtype, after = getattr(torch, arguments.compute_dtype), _after(arguments)
    tower.visual.to(arguments.device, dtype)
    frames = frames_of(tower.spec, distinct=min(arguments.clips, max(16, arguments.batch)))
    there = frames[: arguments.batch].flatten(0, 1).to(arguments.device, dtype)
    block_clips = min(BLOCK, max(1, arguments.clips // 2))  # so that the border of a block is crossed
    job = memory_job(scratch / "none", tower=tower, clips=arguments.clips, block_clips=block_clips)
    passes = passes_of(arguments.clips, block_clips, batch_for(options_of(arguments), job.spec))
    runs: list[Written] = []

    @torch.no_grad()
    def forward() -> None:
        for samples in passes:
            tower.visual(there[: 8 * samples])
        after()

    def ours() -> None:
        cache = scratch / "bare"
        runs.append(extracted(arguments, cache, tower, clips=arguments.clips, block_clips=block_clips))

    with frames_at_hand(frames):
        seconds = medians(interleaved_seconds({"bare": forward, "ours": ours}, arguments.rounds))
    shutil.rmtree(scratch / "bare", ignore_errors=True)
    # Not by the clock around the call, which removes the cache before, makes a new one and waits for the disk.
    seconds["ours"] = statistics.median(run.seconds for run in runs[1:])
    return {
        "vs_bare_forward": seconds["bare"] / seconds["ours"],
        "ours_clips_per_s": arguments.clips / seconds["ours"],
        "bare_clips_per_s": arguments.clips / seconds["bare"],
        "blocks_of_bare": job.spec.num_blocks,
        "seconds_by_stage": runs[-1].stages,
    }


def passes_of(clips: int, block_clips: int, batch: int) -> list[int]:
    """Samples of each pass over the clips, which never crosses the border of a block."""
    blocks = [min(block_clips, clips - start) for start in range(0, clips, block_clips)]
    return [min(batch, block - start) for block in blocks for start in range(0, block, batch)]


def extracted(
    arguments: argparse.Namespace,
    cache: Path,
    tower: Tower | None,
    *,
    clips: int,
    block_clips: int = BLOCK,
    codec: str = "default",
    batch: int = 0,
) -> Written:
    """Every block of a new cache; what is written before is on the disk when the clock of what is returned starts."""
    job = memory_job(
        cache,
        tower=tower,
        clips=clips,
        block_clips=block_clips,
        codec=codec,
        compute_dtype=arguments.compute_dtype,
    )
    begin(job)
    os.sync()
    return blocks_written(job, options_of(arguments, batch=batch), after=_after(arguments))


def written(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Samples a second with a tower that costs nothing, by codec."""
    cache = scratch / "written"
    stub = StubTower(memory_job(cache, clips=1, compute_dtype=arguments.compute_dtype).spec, arguments.device)
    stub.prepare(arguments.batch)
    found: dict[str, list[Written]] = {codec: [] for codec in _CODECS}
    with stub.in_use(), frames_at_hand(frames_of(memory_job(cache, clips=1).spec.tower)):
        for turn in range(arguments.rounds + 1):  # the first does not count: libraries are loaded
            for codec, runs in found.items():
                clips = BLOCK * (arguments.blocks if turn else 1)
                run = extracted(arguments, cache, None, clips=clips, codec=codec)
                runs.extend([run] * (turn > 0))
    shutil.rmtree(cache)
    result: dict[str, Any] = {}
    for codec, runs in found.items():
        middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
        result |= {
            _CODECS[codec]: statistics.median(run.samples / run.seconds for run in runs),
            f"{_CODECS[codec]}_in_rounds": [round(run.samples / run.seconds, 2) for run in runs],
            f"{_CODECS[codec]}_seconds_by_stage": middle.stages,
            f"{_CODECS[codec]}_processor_s_a_sample": min(run.processor_s / run.samples for run in runs),
            f"{_CODECS[codec]}_processors_used": round(middle.processor_s / middle.seconds, 2),
        }
    return result


def estimate(arguments: argparse.Namespace, scratch: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Predicted samples a second beside those measured, of the stub, and where `bare` was measured, of the tower."""
    costs, cores = core_costs(scratch), len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"core_costs": {name: round(value, 2) for name, value in asdict(costs).items()}}
    rates: dict[str, tuple[Tower | None, int, float, float]] = {
        "written": (None, BLOCK * arguments.blocks, measured[_CODECS["default"]], 1e-9)
    }
    if arguments.is_gpu and "bare_clips_per_s" in measured:
        tower, device_s = build_tower(arguments.model, "none"), 1 / measured["bare_clips_per_s"]
        rates["tower"] = (tower, arguments.clips, measured["ours_clips_per_s"], device_s)
    for name, (tower, clips, rate, device_s) in rates.items():
        spec = memory_job(
            scratch / "none", tower=tower, clips=clips, compute_dtype=arguments.compute_dtype
        ).spec
        row_ms = rows_ms(spec, arguments.device, batch=arguments.batch)
        predicted, limited_by = predicted_rate(
            spec, costs, cores=cores, rows_ms=row_ms, device_s=device_s, border_s=0.0
        )
        result[f"predicted_{name}"] = {
            "samples_per_s": predicted,
            "limited_by": limited_by,
            "rows_ms": row_ms,
            "measured_vs_predicted": rate / predicted,
        }
    return result


def padding(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Processor seconds of one block at several batches, the least of rounds in turns, and the dearest against the cheapest."""
    tower = build_tower(arguments.small_model, "none")
    cache = scratch / "padding"
    took: dict[int, list[float]] = {batch: [] for batch in PADDED}
    with frames_at_hand(frames_of(tower.spec)):
        for turn in range(arguments.rounds + 1):
            first = turn % len(PADDED)  # none always follows the same one
            for batch in PADDED[first:] + PADDED[:first]:
                run = extracted(arguments, cache, tower, clips=BLOCK, batch=batch)
                took[batch].extend([run.processor_s] * (turn > 0))
    shutil.rmtree(cache)
    found = {batch: min(seconds) for batch, seconds in took.items()}
    return {
        "padding_model": arguments.small_model,
        "padding_processor_s": {str(batch): round(seconds, 3) for batch, seconds in found.items()},
        "padding_dearest_vs_cheapest": max(found.values()) / min(found.values()),
    }


def ranks(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Samples a second of several processes on one cache together, with the stub, and on a GPU with the tower too."""
    result: dict[str, Any] = {"ranks": arguments.ranks}
    for name, model in (("stub", ""), *((("tower", arguments.model),) if arguments.is_gpu else ())):
        runs = [list(_run_ranks(arguments, scratch, model)) for _ in range(arguments.rounds)]
        rates = [
            sum(rank["samples"] for rank in run)
            / (max(rank["ended_s"] for rank in run) - min(rank["began_s"] for rank in run))
            for run in runs
        ]
        result |= {
            f"ranks_{name}_samples_per_s": statistics.median(rates),
            f"ranks_{name}_samples_of_each": [rank["samples"] for rank in runs[-1]],
            f"ranks_{name}_seconds_by_stage": [rank["stages"] for rank in runs[-1]],
        }
    return result


def _run_ranks(arguments: argparse.Namespace, scratch: Path, model: str) -> Iterator[dict[str, Any]]:
    """Start processes as torchrun does, let them go together, and yield what each reports."""
    from benchmarks.support.extract_rank import RankWork, free_port

    folder = scratch / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    work = RankWork(
        folder=str(folder),
        model=model,
        clips=BLOCK * arguments.blocks * arguments.ranks,
        batch=arguments.batch,
        device=arguments.device,
        compute_dtype=arguments.compute_dtype,
        decode_workers=arguments.decode_workers,
    )
    shared = {"WORLD_SIZE": arguments.ranks, "LOCAL_WORLD_SIZE": arguments.ranks, "MASTER_PORT": free_port()}
    started = []
    try:
        for rank in range(arguments.ranks):
            of_rank = {**shared, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            told = {name: str(value) for name, value in of_rank.items()}
            words = [sys.executable, "-m", "benchmarks.support.extract_rank", json.dumps(asdict(work))]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | told
            started.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not all((folder / f"ready-{rank}").exists() for rank in range(arguments.ranks)):
            assert all(process.poll() is None for process in started), "a process ended before it began"
            assert time.monotonic() < deadline, "processes do not begin"
            time.sleep(0.05)
        os.sync()
        (folder / "go").touch()
        for process in started:
            output, _ = process.communicate()
            assert process.returncode == 0, f"a process ended with {process.returncode}"
            yield json.loads(output.splitlines()[-1])
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
