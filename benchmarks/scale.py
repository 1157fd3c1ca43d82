"""What a cache of a million samples costs to open, train from, list and finish: `python -m benchmarks.scale --json`.

The caches are generated (`benchmarks.support.large_caches`: all real but the features): Kinetics-400 with one view and with
ten (2.4 million samples, 40,000 blocks), and ten million samples (1,000,000 clips of ten views; one layer and no maps, so
that its marks take one gigabyte). Each part runs in processes of its own, which have imported everything before they are
measured. Seconds of `..._cpu_s` are the processor's, the others the clock's. Memory is the rise above a process that has
only imported the package: proportional shares (PSS), files of the cache that are mapped included.

    SIZE.open_cpu_s, .open_mb     a process opens the cache; `open_peak_mb`: the most on the way
    SIZE.open_mb_8                eight processes have it open together
    SIZE.first_batch_s            from imports to the first step: opening both caches, set-up, batch, a step of a small head;
                                  `first_batch_import_s`: what torch imports with the first optimiser, before that
    SIZE.end_s, .end_cpu_s        one process ends an extraction whose blocks are all done; `end_mb`: its most memory;
                                  `end_without_segments_cpu_s`: where the extraction left no segments of the index
    SIZE.end_others_s             processor seconds, at most, of each of two other processes of that run
    SIZE.resume_s                 the extraction is run again, with nothing to do
    ls_20_s                       `ls` of 20 caches (the largest measured, under 20 names)
    open_url_requests, .._s       opening behind a web server, and in moto's S3 (`open_s3_…`) where these are installed
    files_a_block, directories_a_block, and of the layout `folders`: counted
    epoch_order_s                 the first batch of an epoch of ten million samples; by blocks, and one of ten views each
    lists                         a list of a million clips

Linux only. The generated caches of all sizes take 5 GB and 230,000 inodes.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks.support.large_caches import make_unfinished, write_large_cache
from benchmarks.support.large_sizes import SIZES, Size
from benchmarks.support.machine import machine
from benchmarks.support.scale_servers import opened_behind_url, opened_in_s3
from benchmarks.support.stepped_processes import run_together
from evl_cache.spec import CacheSpec
from evl_cache.store import read_description

MODULE = "benchmarks.support.scale_parts"
DEFAULT_SIZES = "k400x1,k400x10,10m"
PROCESSES, LISTED, ENDING = 8, 20, 3
_VAL_SHARE = 20  # a validation cache has a twentieth of the clips

Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--sizes", default=DEFAULT_SIZES, help=f"of {', '.join(SIZES)}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--directory", type=Path, help="where the caches go; one that is there is used")
    parser.add_argument("--keep", action="store_true", help="leave the caches there")
    arguments = parser.parse_args()
    sizes, parts = arguments.sizes.split(","), arguments.parts.split(",")
    if unknown := [*({*sizes} - SIZES.keys()), *({*parts} - PARTS.keys())]:
        parser.error(f"{', '.join(unknown)}: expected sizes {', '.join(SIZES)}, parts {', '.join(PARTS)}")
    with ExitStack() as kept:
        if arguments.directory is None:
            made = kept.enter_context(tempfile.TemporaryDirectory(prefix="evl-cache-scale-"))
            caches = Caches(Path(made))
        else:
            caches = Caches(arguments.directory)
        if not arguments.keep:
            kept.callback(caches.remove)
        result: Found = {}
        for part in parts:
            for size in sizes if part in PARTS_OF_SIZES else sizes[-1:]:
                print(f"{part} of {size} …", file=sys.stderr, flush=True)
                found = PARTS[part](caches, size)
                print(json.dumps(found), file=sys.stderr, flush=True)
                result |= found
    print(json.dumps({**result, "sizes": sizes, "parts": parts, "machine": machine()}))


class Caches:
    """The generated caches, each made when it is asked for.

    Args:
        root: directory they lie in, each in a folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: list[Path] = []

    def of(self, size: str, *, split: str = "train", folder: str | None = None, **changes: Any) -> Path:
        """The cache of a size; a validation cache is a twentieth of it. `changes`: to the size."""
        path = self.root / (folder or size) / split
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            clips = SIZES[size].clips // (1 if split == "train" else _VAL_SHARE)
            whole: Size = replace(SIZES[size], **{"clips": clips, "split": split, **changes})
            self._made.append(path)
            write_large_cache(path, whole)
        return path

    def remove(self) -> None:
        """Remove what was made, and nothing that was there."""
        for path in self._made:
            shutil.rmtree(path)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def opening(caches: Caches, size: str) -> Found:
    """One process, and eight together, open a cache."""
    path = str(caches.of(size))
    (one,) = run_together(MODULE, "opened", [{"path": path}])
    eight = run_together(MODULE, "opened", [{"path": path}] * PROCESSES)
    return {
        f"{size}.open_s": one["seconds"],
        f"{size}.open_cpu_s": one["cpu_s"],
        f"{size}.open_mb": one["mb"],
        f"{size}.open_peak_mb": one["peak_mb"],
        f"{size}.open_mb_8": round(sum(found["mb"] for found in eight), 3),
        f"{size}.open_cpu_s_8": round(sum(found["cpu_s"] for found in eight), 3),
    }


def training(caches: Caches, size: str) -> Found:
    """The first batch of training."""
    path, val = caches.of(size), caches.of(size, split="val")
    layers = len(read_description(path).spec.layers)
    arguments = {"train_path": str(path), "val_path": str(val), "layers": layers}
    (found,) = run_together(MODULE, "first_batch", [arguments])
    return {
        f"{size}.first_batch_s": found["seconds"],
        f"{size}.first_batch_cpu_s": found["cpu_s"],
        f"{size}.first_batch_opening_s": found["opening_s"],
        f"{size}.first_batch_import_s": found["optimiser_import_s"],
        f"{size}.first_batch_mb": found["mb"],
        f"{size}.first_batch_peak_mb": found["peak_mb"],
    }


def inodes(caches: Caches, size: str) -> Found:
    """Files and directories of a block, as caches are written now and with a folder for each part of a chunk's key."""
    out: Found = {}
    for name, changes in {"": {}, "_of_folders": {"chunk_keys": "folders"}}.items():
        if changes and "chunk_keys" not in {field.name for field in fields(CacheSpec)}:
            continue
        counts = []
        for clips in (60, 120):
            path = caches.of("k400x10", folder=f"inodes{name}-{clips}", clips=clips, changes=changes)
            walked = [(len(directories), len(files)) for _, directories, files in os.walk(path)]
            counts.append([sum(column) for column in zip(*walked, strict=True)])
        directories, files = ((b - a) / 10 for a, b in zip(*counts, strict=True))
        out |= {f"files_a_block{name}": files, f"directories_a_block{name}": directories}
    return out


def listing(caches: Caches, size: str) -> Found:
    """`ls` of twenty caches: one cache under twenty names."""
    (found,) = run_together(MODULE, "listed", [{"places": [str(caches.of(size))] * LISTED}])
    assert found["caches"] == LISTED
    return {"ls_20_s": found["seconds"], "ls_20_cpu_s": found["cpu_s"]}


def behind_url(caches: Caches, size: str) -> Found:
    """A cache is opened behind servers."""
    return opened_behind_url(caches.of(size)) | opened_in_s3(caches.of(size))


def ending(caches: Caches, size: str) -> Found:
    """An extraction ends, in one process and in three; and it is run again."""
    path = caches.of(size)
    spec = read_description(path).spec
    resuming = {"path": str(path), "size": size}
    (again,) = run_together(MODULE, "resumed", [resuming])

    def ended(segments: Path | None, processes: int) -> list[Found]:
        make_unfinished(path, spec, segments)
        return run_together(MODULE, "ended", [{"path": str(path)}] * processes)

    (bare,) = ended(None, 1)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".segments-") as folder:
        (alone,) = ended(Path(folder) / "kept", 1)
        together = ended(Path(folder) / "kept", ENDING)
    writer, *others = sorted((found["cpu_s"] for found in together), reverse=True)
    return {
        f"{size}.end_s": alone["seconds"],
        f"{size}.end_cpu_s": alone["cpu_s"],
        f"{size}.end_mb": alone["peak_mb"],
        f"{size}.end_without_segments_cpu_s": bare["cpu_s"],
        f"{size}.end_writer_s": writer,
        f"{size}.end_others_s": others[0],
        f"{size}.resume_s": again["seconds"],
        f"{size}.resume_cpu_s": again["cpu_s"],
        f"{size}.resume_mb": again["peak_mb"],
    }


def lists(caches: Caches, size: str) -> Found:
    """Lists of clips, and orders of samples."""
    (order,) = run_together(MODULE, "epoch_order", [{"samples": 10_000_000}])
    (million,) = run_together(MODULE, "lists", [{"clips": 1_000_000}])
    (read,) = run_together(MODULE, "clips_read", [{"path": str(caches.of(size))}])
    return {
        "epoch_order_s": order["all.seconds"],
        "epoch_order_blocks_s": order["blocks.seconds"],
        "epoch_order_views_s": order["views.seconds"],
        "epoch_order_mb": max(order[f"{kind}.peak_mb"] for kind in ("all", "blocks", "views")),
        "lists": {"a_million": million, f"clips_read_of_{size}": read},
    }


PARTS: Mapping[str, Callable[[Caches, str], Found]] = {
    "open": opening,
    "train": training,
    "inodes": inodes,
    "ls": listing,
    "url": behind_url,
    "end": ending,
    "lists": lists,
}
PARTS_OF_SIZES = ("open", "train", "end")  # the others are of the last size alone

if __name__ == "__main__":
    main()
