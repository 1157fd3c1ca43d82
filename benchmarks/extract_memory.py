"""Whether a long extraction, and a long video, keeps its memory: `python -m benchmarks.extract_memory --json`.

2,000 clips (a few dozen files of several codecs and sizes under many names, some damaged) through a small tower. The
resident memory of the process and of those that decode is looked at the whole time; the peak of all of it is held
against the peak of the first 200 clips. Then an hour of 4K in a process that decodes, against five seconds of it.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.long_clips import render_clips, render_enlarged, repeat_clip
from benchmarks.support.machine import machine
from evl_cache.clips import Clip, ClipList
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.stage import extract, make_spec
from evl_cache.sampling import strided_test_views
from evl_cache.spec import ViewSpec
from evl_cache.towers import build_tower
from evl_cache.video import collect
from evl_cache.video.pool import DecodePool

CODECS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4")
_TOWER = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32},
}
_LOOK_S = 0.02


class MemoryOfAll:
    """Resident bytes of this process and of its children, looked at in a thread; the peak by number of clips."""

    def __init__(self) -> None:
        self.clips = 0
        self.peak_by_clips: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "MemoryOfAll":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def note_clip(self, failed: bool) -> None:
        self.clips += 1

    def peak_bytes(self, first: int, last: int) -> int:
        """While that many clips were done."""
        return max(peak for clips, peak in self.peak_by_clips.items() if first <= clips < last)

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_S):
            clips = self.clips
            self.peak_by_clips[clips] = max(self.peak_by_clips.get(clips, 0), resident_bytes_of_all())


def resident_bytes_of_all() -> int:
    """Of this process and its children."""
    return sum(map(_resident_bytes, [os.getpid(), *_children()]))


def _children() -> list[int]:
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            pids += map(int, (task / "children").read_text().split())
        except FileNotFoundError:
            continue  # the thread ended meanwhile
    return pids


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0  # it ended meanwhile


def make_list(folder: Path, count: int) -> ClipList:
    """`count` names for few files: each codec at each size, and a fourth cut off."""
    files = []
    for number, codec in enumerate(CODECS):
        files += render_clips(folder / codec, count=3, num_frames=90, codec=codec)
        broken = folder / codec / "broken.mp4"
        broken.write_bytes(files[-1].read_bytes()[: 20_000 + 1000 * number])
        files.append(broken)
    links = folder / "links"
    links.mkdir()
    clips = []
    for number in range(count):
        name = f"{number:05d}.mp4"
        (links / name).symlink_to(files[number % len(files)])
        clips.append(Clip(id=name, path=str(links / name), label=0, split="train"))
    return ClipList(clips=tuple(clips), classes=("only",), source="generated")


def measure(folder: Path, *, clips: int, first: int) -> dict[str, object]:
    """Extract `clips` clips; the peak after the first ones over the peak of those."""
    (folder / "tower.json").write_text(json.dumps(_TOWER))
    tower = build_tower(str(folder / "tower.json"), "none")
    listed = make_list(folder, clips)
    spec = make_spec(
        listed, dataset="generated", split="train", tower=tower.spec, layers=(2, 3), views=ViewSpec(stride=8)
    )
    started = time.monotonic()
    with MemoryOfAll() as memory:
        job = ExtractionJob(clips=listed, root=folder, cache_path=folder / "cache", spec=spec, tower=tower)
        result = extract(job, options=ExtractOptions(decode_workers=2), on_clip=memory.note_clip)
    before, after = memory.peak_bytes(0, first), memory.peak_bytes(first, clips + 1)
    return {
        "peak_vs_first": after / before,
        "first": first,
        "peak_of_first_mb": before / 1e6,
        "peak_after_mb": after / 1e6,
        "peaks_mb": [
            round(memory.peak_bytes(start, start + first) / 1e6) for start in range(0, clips, first)
        ],
        "clips": clips,
        "failed": len(result.failures),
        "clips_per_s": clips / (time.monotonic() - started),
    }


def measure_hour_of_4k(folder: Path) -> dict[str, float]:
    """Peak memory of a process that decodes 8 frames of an hour of 4K, over that of one with five seconds of it."""
    short, hour = folder / "short.mp4", folder / "hour.mp4"
    render_enlarged(short, factor=8, num_frames=150)
    repeat_clip(short, hour, 3600 * 30 // 150)
    peaks = [peak_of_decoding(path) for path in (short, hour)]
    return {
        "hour_of_4k_vs_five_seconds": peaks[1] / peaks[0],
        "five_seconds_of_4k_mb": peaks[0] / 1e6,
        "hour_of_4k_mb": peaks[1] / 1e6,
        "hour_of_4k_file_mb": hour.stat().st_size / 1e6,
    }


def peak_of_decoding(path: Path) -> int:
    """Peak resident bytes of a new process after the 8 frames of one clip were taken from it."""
    before = set(_children())
    with DecodePool(1) as pool:
        frames = collect(
            pool.frames(path, lambda count: strided_test_views(count, frames=8, stride=16))
        ).frames
        assert len(frames) == 8
        (worker,) = set(_children()) - before
        status = Path(f"/proc/{worker}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--first", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch:
        found = measure(Path(scratch), clips=arguments.clips, first=arguments.first)
        found |= measure_hour_of_4k(Path(scratch))
    print(json.dumps({**found, "machine": machine()}))


if __name__ == "__main__":
    main()
