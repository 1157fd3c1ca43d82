"""Time to label one clip, after start-up: `python -m benchmarks.predict --json`.

A rendered clip of ten seconds (300 frames of 320 x 240, H.264), the demo's tower and decoder4 with new weights, one
view of 8 frames; `seconds_10s_clip` is the median from the call to its scores, the tower built anew each time.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np

from benchmarks.support.machine import machine
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.request import ExtractRequest, extract_dataset
from evl_cache.live.predict import predict
from evl_cache.rendered import write_video
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.train.options import TrainOptions
from evl_cache.train.stage import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        root = Path(scratch)
        rng = np.random.default_rng(0)
        picture = rng.integers(0, 255, (15, 20, 3), dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1)
        write_video(
            root / "clip.mp4", np.stack([np.roll(picture, i, axis=1) for i in range(300)]), fps=30, crf=23
        )
        (root / "list.txt").write_text("clip.mp4 0\n")
        asked = ExtractRequest(
            dataset="list",
            list_path=root / "list.txt",
            model=str(files("evl_cache") / "data" / "demo-tower.json"),
            pretrained="none",
            views=ViewSpec(frames=8, stride=16),
            cache=root / "cache",
        )
        for _ in extract_dataset(asked, options=ExtractOptions()):
            pass
        cache = FeatureCache(root / "cache")
        train(cache, cache, options=TrainOptions(steps=1, batch=1), out=root / "run")
        seconds = []
        for _ in range(arguments.rounds + 1):
            started = time.perf_counter()
            predict(root / "run", [root / "clip.mp4"])
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds_10s_clip": statistics.median(seconds[1:]), "machine": machine()}))


if __name__ == "__main__":
    main()
