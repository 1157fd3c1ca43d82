"""`extract --retry-failed` against extracting whole blocks again, as it did before: `python -m benchmarks.redo --json`.

Rendered clips, evl-tiny with random weights, on the CPU. Two clips in a hundred failed, spread out so that every block has
one. Then their files are mended, or, for a retry in vain, are not. Seconds are those that `extract` reports.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.support.machine import machine
from evl_cache.extract import ExtractOptions, ExtractRequest, extract_dataset

EVERY = 50  # of the clips, one fails


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        seconds = measured(Path(scratch), arguments.clips, arguments.rounds)
    result = {
        "vs_whole_blocks": seconds["whole blocks"] / seconds["mended"],
        "in_vain_vs_whole_blocks": seconds["whole blocks"] / seconds["in vain"],
        "clips": arguments.clips,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


def measured(scratch: Path, clips: int, rounds: int) -> dict[str, float]:
    """Median seconds of extracting all blocks, and of retrying with the files mended and as they were."""
    videos, broken, failed, cache = (scratch / name for name in ("videos", "broken", "failed", "cache"))
    extracted_in(videos, scratch / "warm-up", clips)  # draws the clips, too
    shutil.copytree(videos, broken)
    for path in sorted(broken.rglob("*.mp4"))[EVERY // 2 : clips : EVERY]:
        path.write_bytes(path.read_bytes()[:300])
    extracted_in(broken, failed, clips)
    seconds: dict[str, list[float]] = {"whole blocks": [], "mended": [], "in vain": []}
    for _ in range(rounds):
        for name, root in (("whole blocks", videos), ("mended", videos), ("in vain", broken)):
            shutil.rmtree(cache, ignore_errors=True)
            if name != "whole blocks":
                shutil.copytree(failed, cache)
            seconds[name].append(extracted_in(root, cache, clips, retry_failed=name != "whole blocks"))
    return {name: statistics.median(values) for name, values in seconds.items()}


def extracted_in(root: Path, cache: Path, clips: int, *, retry_failed: bool = False) -> float:
    """Seconds of an extraction."""
    request = ExtractRequest(
        dataset="motions",
        root=root,
        split="train",
        limit=clips,
        model="evl-tiny",
        pretrained="none",
        cache=cache,
    )
    ((_, result),) = extract_dataset(request, options=ExtractOptions(retry_failed=retry_failed))
    return result.seconds


if __name__ == "__main__":
    main()
