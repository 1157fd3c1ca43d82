"""Extraction by two processes of torchrun against one: `python -m benchmarks.cluster --json`.

The same command each time, `torchrun … -m evl_cache_cli extract …`, one thread of torch and one decoding process a rank,
on the CPU. Rendered clips, and a small tower with random weights, whose forward pass is most of the work as it is with
the towers one uses. Both caches hold the same bytes. Speed is the first process's own count, from the plan to the
manifest; `two_ranks_vs_one_whole_command` counts the start of Python and of torchrun too.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.support.machine import machine
from evl_cache.rendered import DEMO_CLASSES, demo_motion_frames, write_video

ROOT = Path(__file__).resolve().parent.parent
DISTINCT = 32  # videos; the others are links to them
_TOWER = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 384, "layers": 12, "head_width": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=256, help="64 are a block")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        folder = Path(scratch)
        lay_down(folder, arguments.clips)
        reports: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for _ in range(arguments.rounds):  # every side is a fresh process each time: nothing to warm up
            for ranks in (1, 2):
                reports[ranks].append(extract(folder, ranks=ranks))
        check_same(folder / "cache-1", folder / "cache-2")
    rates, whole = (
        {
            ranks: statistics.median(row["clips"] / row[name] for row in rows)
            for ranks, rows in reports.items()
        }
        for name in ("seconds", "command_seconds")
    )
    result = {
        "two_ranks_vs_one": rates[2] / rates[1],
        "two_ranks_vs_one_whole_command": whole[2] / whole[1],
        "one_clips_per_s": rates[1],
        "two_clips_per_s": rates[2],
        "clips_of_the_first_of_two": [row["clips_here"] for row in reports[2]],
        "clips": arguments.clips,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


def lay_down(folder: Path, clips: int) -> None:
    """Videos, their list, and the tower's description."""
    (folder / "videos").mkdir()
    lines = []
    for number in range(clips):
        video = folder / "videos" / f"{number:05d}.mp4"
        if number < DISTINCT:
            label = number % len(DEMO_CLASSES)
            write_video(video, demo_motion_frames(DEMO_CLASSES[label], number // len(DEMO_CLASSES), size=64))
        else:
            video.hardlink_to(folder / "videos" / f"{number % DISTINCT:05d}.mp4")
        lines.append(f"{video.name} {number % len(DEMO_CLASSES)}\n")
    (folder / "clips.txt").write_text("".join(lines))
    (folder / "tower.json").write_text(json.dumps(_TOWER))


def extract(folder: Path, *, ranks: int) -> dict[str, Any]:
    """Run the command from nothing. Returns: what its first process reports of the cache."""
    cache = folder / f"cache-{ranks}"
    shutil.rmtree(cache, ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    data = ["--dataset", "list", "--list", "clips.txt", "--root", "videos", "--split", "train"]
    tower = ["--model", "tower.json", "--pretrained", "none", "--layers", "9-12", "--stride", "1"]
    where = ["--device", "cpu", "--decode-workers", "1", "--cache", str(cache), "--json"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "evl_cache_cli", "extract", *data, *tower, *where],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["caches"]
    assert report["failed"] == 0, report
    return {**report, "command_seconds": time.perf_counter() - started}


def check_same(one: Path, two: Path) -> None:
    """Every file of both caches has the same bytes."""
    names = [
        sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
        for cache in (one, two)
    ]
    assert names[0] == names[1], set(names[0]) ^ set(names[1])
    _, other, unread = filecmp.cmpfiles(one, two, names[0], shallow=False)
    assert not other and not unread, (other, unread)


if __name__ == "__main__":
    main()
