"""Extraction from decoded frames against the bare forward pass: `python -m benchmarks.extract --json`.

ViT-B/16 with random weights, 8 frames, layers 8 to 12, on the CPU. The bare side is open_clip's own forward pass
of the same tower over the same frames in the same batches; ours makes maps, quantises, compresses, writes, syncs
and marks as well.
"""

import argparse
import json
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.support.machine import interleaved_seconds, machine, medians
from benchmarks.support.stored_features import LAYERS, clip_list
from evl_cache.extract.block import BlockExtractor
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.prepare import PreparedClip
from evl_cache.extract.stage import make_spec
from evl_cache.spec import ViewSpec
from evl_cache.store import LOCKS_NAME, ClipRecord, LockWatcher, create_cache
from evl_cache.towers import Tower, build_tower


class FromMemory(BlockExtractor):
    """Stage one behind the decoder: frames are in memory."""

    frames: torch.Tensor

    def _prepare(self, row: int) -> PreparedClip:
        return PreparedClip(record=ClipRecord(id=str(row)), samples=self.frames[row][None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tower = build_tower("ViT-B-16-quickgelu", "none")
    frames = torch.randn(arguments.clips, 8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:

        @torch.no_grad()
        def bare() -> None:
            for start in range(0, arguments.clips, arguments.batch):
                tower.visual(frames[start : start + arguments.batch].flatten(0, 1))

        def ours() -> None:
            extract_once(Path(scratch) / "cache", frames, tower, arguments.batch)

        seconds = medians(interleaved_seconds({"bare": bare, "ours": ours}, arguments.rounds))
    result = {
        "vs_bare_forward": seconds["bare"] / seconds["ours"],
        "ours_clips_per_s": arguments.clips / seconds["ours"],
        "bare_clips_per_s": arguments.clips / seconds["bare"],
        "clips": arguments.clips,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


def extract_once(cache: Path, frames: torch.Tensor, tower: Tower, batch: int) -> None:
    """One block from frames to a marked cache."""
    shutil.rmtree(cache, ignore_errors=True)
    clips = clip_list(len(frames))
    spec = make_spec(
        clips, dataset="generated", split="train", tower=tower.spec, layers=LAYERS, views=ViewSpec()
    )
    create_cache(cache, spec, clips.clips, origin={}, created_with={})
    job = ExtractionJob(clips=clips, root=cache, cache_path=cache, spec=spec, tower=tower)
    extractor = FromMemory(job, options=ExtractOptions(batch=batch))
    extractor.frames = frames
    lock = LockWatcher(cache / LOCKS_NAME).take(0)
    assert lock is not None
    with closing(extractor), lock:
        extracted = extractor.extract(0, lock)
        assert extracted is not None
        extracted.writer.commit(extracted.records, extracted.environment)
        extracted.writer.close()


if __name__ == "__main__":
    main()
