"""Every frame served of a corpus against a decode from the start: `python -m benchmarks.prove_frames FOLDER --json`.

All videos in a folder and the folders in it, or clips that are rendered in every codec where none is given. Of each,
one centre view, three views and TSN samples are decoded as `extract` does, and compared, number and pixels, with a decode
from the start (`EVL_CACHE_PROVE_FRAMES=1`). `scan_share` is the time for reading the packets, which decides who decodes,
as a share of the time for the centre view.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch  # noqa: F401  # before the decoders: their bundled libraries clash otherwise

from benchmarks.long_clips import render_clips
from benchmarks.support.machine import machine
from evl_cache.datasets.places import VIDEO_SUFFIXES
from evl_cache.errors import ClipError
from evl_cache.sampling import strided_test_views, tsn_test_views
from evl_cache.spec import DECODERS
from evl_cache.video import Choose, DecodeOptions, collect
from evl_cache.video.packets import read_packets
from evl_cache.video.pool import DecodePool
from evl_cache.video.proof import VARIABLE

VIEWS: dict[str, Choose] = {
    "centre": lambda count: strided_test_views(count, frames=8, stride=4),
    "three_views": lambda count: strided_test_views(count, frames=8, stride=4, views=3),
    "tsn": lambda count: tsn_test_views(count, frames=8),
}
RENDERED = (("libx264", "mp4"), ("libx264", "mkv"), ("libx264", "ts"), ("libx265", "mp4"), ("libvpx-vp9", "webm"),
            ("libsvtav1", "mp4"), ("mpeg4", "avi"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="of videos [rendered ones]")
    parser.add_argument("--decoder", choices=DECODERS, default="auto")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    arguments = parser.parse_args()
    options = DecodeOptions(decoder=arguments.decoder)
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        paths = videos_of(arguments.folder) if arguments.folder else rendered(Path(scratch))
        result = {**proved(paths, options), **timed(paths, options)}
    print(json.dumps({**result, "decoder": arguments.decoder, "machine": machine()}))


def videos_of(folder: Path) -> list[Path]:
    """Return the videos in a folder and the folders in it."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
    )


def rendered(folder: Path) -> list[Path]:
    """Return three clips of every codec."""
    return [
        path
        for codec, suffix in RENDERED
        for path in render_clips(
            folder / f"{codec}-{suffix}", count=3, num_frames=120, codec=codec, suffix=suffix
        )
    ]


def proved(paths: list[Path], options: DecodeOptions) -> dict[str, object]:
    """Decode every view of every file with proofs, and return how many were served by which decoder, refused and wrong."""
    served: Counter[str] = Counter()
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    with proofs("1"), DecodePool(2, options=options) as pool:
        for path in paths:
            try:
                clips = [collect(pool.frames(path, choose)) for choose in VIEWS.values()]
                served[clips[0].header.decoder] += 1
            except ClipError as error:
                (wrong if "proof failed" in str(error) else refused)[str(path)] = str(error)
    return {
        "files": len(paths),
        "served": dict(served),
        "refused": refused,
        "wrong": len(wrong),
        "wrong_files": wrong,
    }


def timed(paths: list[Path], options: DecodeOptions) -> dict[str, float]:
    """Return what reading the packets costs, beside what the centre view does; medians over files that are served."""
    scans, decodes = [], []
    with proofs("0"), DecodePool(1, options=options) as pool:
        for path in (*paths[:1], *paths):  # the first one also starts the process and is not counted
            try:
                decode = seconds(lambda p=path: collect(pool.frames(p, VIEWS["centre"])))  # type: ignore[misc]
            except ClipError:
                continue
            decodes.append(decode)
            scans.append(seconds(lambda p=path: read_packets(p)))  # type: ignore[misc]
    if len(scans) < 2:
        return {}
    scans, decodes = scans[1:], decodes[1:]
    return {
        "scan_ms": 1000 * statistics.median(scans),
        "decode_ms": 1000 * statistics.median(decodes),
        "scan_share": float(np.sum(scans) / np.sum(decodes)),
    }


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def proofs(value: str) -> Iterator[None]:
    """Set whether processes that are started meanwhile prove what they serve."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


if __name__ == "__main__":
    main()
