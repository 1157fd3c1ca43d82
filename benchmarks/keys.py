"""Flat chunk keys against folders for each shard, in blocks of six arrays: `python -m benchmarks.keys --json`.

Caches are written by the store, one clip of the smallest features a block, so that what is measured is names, not bytes:
`--blocks` of them are committed (with every fsync), listed, opened, read one row a block in random order, and removed.
With `--image` (root alone) they lie in an ext4 image of their own, which is mounted anew before listing, opening and
removing: nothing of it is in memory then. The same is done with `--far-blocks` blocks on a FUSE file system whose every
call waits `--latency-ms`, and which counts calls: what the client of a network disk sends that remembers names for a
second. A ratio is folders over flat.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.machine import machine
from benchmarks.support.stored_features import VIT_B_16, clip_list
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store import (
    LOCKS_NAME,
    BlockWriter,
    ClipRecord,
    FeatureCache,
    LockWatcher,
    array_layouts,
    create_cache,
    finish_cache,
)
from tests.support.lying_disk import Fault, LyingDisk, lying_disk, why_not

KINDS = ("folders", "flat")
TOWER = replace(VIT_B_16, image_size=2, patch_size=1, width=2, heads=1)
_REMEMBERED_S = 1.0  # names and attributes, by the client of a far disk
_IMAGE_NBYTES = 4 << 30
Remount = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument(
        "--rounds", type=int, default=3, help="on the local disk; the kinds take turns, medians are told"
    )
    parser.add_argument("--far-blocks", type=int, default=40)
    parser.add_argument("--latency-ms", type=float, default=1.0)
    parser.add_argument(
        "--image", action="store_true", help="in an image of its own, mounted anew before each step"
    )
    parser.add_argument("--place", type=Path, help="where scratch files lie")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-keys-", dir=arguments.place) as scratch:
        measure(Path(scratch) / "warm", KINDS[0], 2)  # what is compiled and imported is not counted
        with _near(Path(scratch), image=arguments.image) as (place, remount):
            near = _medians(
                [
                    {keys: measure(place / keys, keys, arguments.blocks, remount) for keys in KINDS}
                    for _ in range(arguments.rounds)
                ]
            )
        far = _far(Path(scratch), arguments.far_blocks, arguments.latency_ms / 1e3)
    result: dict[str, Any] = {"blocks": arguments.blocks, "rounds": arguments.rounds, "local": near}
    result |= {f"local_{name}_ratio": near["folders"][name] / near["flat"][name] for name in near["flat"]}
    if far is not None:
        result |= {"far_blocks": arguments.far_blocks, "latency_ms": arguments.latency_ms, "far": far}
        result |= {f"far_{name}_ratio": far["folders"][name] / far["flat"][name] for name in far["flat"]}
    print(json.dumps({**result, "machine": machine()}))


def _medians(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        keys: {name: statistics.median(found[keys][name] for found in rounds) for name in rounds[0][keys]}
        for keys in KINDS
    }


def measure(cache: Path, keys: str, blocks: int, remount: Remount = lambda: None) -> dict[str, float]:
    """Files and directories a block, and seconds of each step, of a cache of so many blocks that is made and removed.

    In an image, also how often listing and reading asked the disk.
    """
    spec = _spec(keys, blocks)
    created = _seconds(lambda: _write(cache, spec))
    remount()
    found = Counter[str]()
    before = _disk_reads(cache)
    listed = _seconds(lambda: found.update(_counts(cache)))
    list_reads = _disk_reads(cache) - before
    remount()
    opened = list[FeatureCache]()
    opening, before = _seconds(lambda: opened.append(FeatureCache(cache))), _disk_reads(cache)
    read = _seconds(lambda: _read(opened.pop()))
    reads = {
        "list_disk_reads_a_block": list_reads / blocks,
        "read_disk_reads_a_block": (_disk_reads(cache) - before) / blocks,
    }
    remount()
    removed = _seconds(lambda: shutil.rmtree(cache))
    return {
        "files_a_block": found["files"] / blocks,
        "directories_a_block": found["directories"] / blocks,
        "create_seconds": created,
        "list_seconds": listed,
        "open_seconds": opening,
        "read_seconds": read,
        "delete_seconds": removed,
    } | (reads if list_reads else {})


def _disk_reads(path: Path) -> int:
    """How often the disk below an image was asked, so far; 0 elsewhere."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    device = next((device for device, mount, *_ in mounts if mount == str(path.parent)), "none")
    counts = Path("/sys/block", Path(device).name, "stat")
    return int(counts.read_text().split()[0]) if "loop" in device else 0


def _far(scratch: Path, blocks: int, latency_s: float) -> dict[str, dict[str, float]] | None:
    """As `measure`, and calls a block, on a disk whose calls wait; None where there can be none."""
    if (reason := why_not()) is not None:
        print(f"no far disk: {reason}")
        return None
    found = {}
    with lying_disk(scratch / "backing", scratch / "mount", attributes_s=_REMEMBERED_S) as disk:
        for keys in KINDS:
            steps = _Steps(disk, latency_s)
            steps.next()
            seconds = measure(disk.path / keys, keys, blocks, steps.next)
            steps.next()
            names = ("create", "list", "read", "delete")
            calls = {
                f"{name}_calls_a_block": n / blocks for name, n in zip(names, steps.calls[1:], strict=True)
            }
            found[keys] = seconds | calls
    return found


class _Steps:
    """Counts the calls of each step, after which what is remembered of names is forgotten."""

    def __init__(self, disk: LyingDisk, latency_s: float) -> None:
        self._disk, self._latency_s, self.calls = disk, latency_s, list[int]()

    def next(self) -> None:
        self.calls.append(sum(self._disk.calls().values()))
        time.sleep(1.5 * _REMEMBERED_S)
        self._disk.set(Fault("any", sleep_s=self._latency_s, times=None))


def _spec(keys: str, blocks: int) -> CacheSpec:
    clips = clip_list(blocks)
    return CacheSpec(
        dataset="keys", split="train", classes=clips.classes, tower=TOWER, views=ViewSpec(frames=2), layers=(1,),
        tokens="int8", maps="uint8", compute_dtype="float32", num_clips=blocks, content_id=clips.content_id,
        block_clips=1, chunk_keys=keys,
    )  # fmt: skip


def _write(cache: Path, spec: CacheSpec) -> None:
    clips, locks = clip_list(spec.num_clips).clips, LockWatcher(cache / LOCKS_NAME)
    create_cache(cache, spec, clips, origin={}, created_with={})
    row = {
        name: np.zeros((1, *layout.chunk_shape), layout.dtype) for name, layout in array_layouts(spec).items()
    }
    with ThreadPoolExecutor(1) as encoders:
        for block, clip in enumerate(clips):
            lock = locks.take(block)
            assert lock is not None
            with (
                lock,
                contextlib.closing(BlockWriter(cache, spec, block, lock=lock, encoders=encoders)) as writer,
            ):
                writer.append(row)
                writer.commit([ClipRecord(id=clip.id)], {})
    finish_cache(cache, spec)


def _counts(cache: Path) -> Counter[str]:
    found = Counter[str]()
    for _, directories, files in os.walk(cache):
        found["directories"] += len(directories)
        found["files"] += len(files)
    return found


def _read(cache: FeatureCache) -> None:
    """Read a row of every block in random order: each opens a file of each array."""
    rows = list(range(cache.spec.num_clips))
    random.Random(0).shuffle(rows)
    for row in rows:
        cache.read_row(row)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextlib.contextmanager
def _near(scratch: Path, *, image: bool) -> Iterator[tuple[Path, Remount]]:
    """A place on this disk, and what makes the next step find nothing of it in memory."""
    if not image:
        yield scratch / "near", lambda: None
        return
    file, mount = scratch / "image", scratch / "near"
    mount.mkdir()
    with file.open("wb") as opened:
        opened.truncate(_IMAGE_NBYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", file], check=True)

    def remount() -> None:
        subprocess.run(["umount", mount], check=True)
        subprocess.run(["mount", "-o", "loop", file, mount], check=True)

    subprocess.run(["mount", "-o", "loop", file, mount], check=True)
    try:
        yield mount, remount
    finally:
        subprocess.run(["umount", mount], check=False)


if __name__ == "__main__":
    main()
