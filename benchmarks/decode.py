"""Our decode pool against what one would write at first: `python -m benchmarks.decode --json`.

Clips of 300 frames, of which 8 are wanted, 16 apart. Ours: two processes, everything checked that an extraction
checks. Against it, each in one process: decord with one thread, seeking; and PyAV decoding every frame and picking
afterwards. The official loader makes arrays of all frames before it picks where it samples test views, as here; where
it samples training views it makes arrays of the picked ones only, which is `vs_every_frame_picked_first`. All give the
same frames.

`avi` (MPEG-4 with B-frames, as Xvid codes) and `ts` (H.264) have the same figures without decord, whose seeks give other
frames there.

`segments` prepares segments of long videos (hashed, decoded, cropped), those of one video together as `extract` does,
against one by one: of ten minutes of H.264, whose packets say where to seek, and of a minute of AVI, which is decoded from
its start. Samples are the same to the bit.

`h264`, `hevc` and `vp9` set the pool beside decord, decord2, torchcodec (exact, with PyAV's FFmpeg) and our own reading,
each in one process with one thread: what each takes of a processor for a clip, how much faster the pool is, and whether
all frames are PyAV's to the bit. Those that are not installed are null, with the reason. decord and decord2 are imported
by one name, so one of them must be in a folder of its own (`pip install --target FOLDER decord2`):
`--package decord2=FOLDER`.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch  # before decord: their bundled libraries clash otherwise

from benchmarks.long_clips import NUM_FRAMES, SIZES, render_clips, repeat_clip
from benchmarks.support.decode_peers import NAMES, Peer, digest
from benchmarks.support.machine import interleaved_seconds, machine, medians
from evl_cache.clips import Clip, Segment
from evl_cache.extract import PreparedClip, begin_crop_thread
from evl_cache.extract.prepare import prepare_clips
from evl_cache.sampling import strided_test_views
from evl_cache.spec import TowerSpec, ViewSpec
from evl_cache.video import collect
from evl_cache.video.pool import DecodePool
from evl_cache.video.which_decord import decord_and_version, has_decord, load_decord

WORKERS = 2
SEGMENT_S = 5.0
VIT_B_16 = TowerSpec(
    model="ViT-B-16", pretrained="none", weights_sha256="0" * 64, image_size=224, patch_size=16, width=768, blocks=12,
    heads=12, quick_gelu=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
)  # fmt: skip
CODECS = {"h264": ("libx264", "mp4"), "hevc": ("libx265", "mp4"), "vp9": ("libvpx-vp9", "webm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object (always so)")
    parser.add_argument("--clips", type=int, default=6, help="distinct ones")
    parser.add_argument("--repeats", type=int, default=4, help="how often each is decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--package", action="append", default=[], metavar="NAME=FOLDER", help="where one is kept"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evl-cache-bench-") as scratch, DecodePool(WORKERS) as pool:
        result = {
            **measure_mp4(pool, Path(scratch) / "mp4", arguments),
            "avi": measure(pool, render(Path(scratch) / "avi", arguments, codec="mpeg4"), arguments),
            "ts": measure(pool, render(Path(scratch) / "ts", arguments, codec="libx264"), arguments),
            "segments": measure_segments(pool, Path(scratch) / "segments", arguments.rounds),
            **measure_peers(pool, Path(scratch), arguments),
        }
    result |= {
        "workers": WORKERS,
        "frames_of_a_clip": NUM_FRAMES,
        "sizes": [f"{width}x{height}" for height, width in SIZES],
        "clips": arguments.clips * arguments.repeats,
        "rounds": arguments.rounds,
        "machine": machine(),
    }
    print(json.dumps(result))


def render(folder: Path, arguments: argparse.Namespace, *, codec: str) -> list[Path]:
    """Return clips in the container that the folder is named after."""
    return render_clips(folder, count=arguments.clips, codec=codec, suffix=folder.name)


def measure_mp4(pool: DecodePool, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Return the ratios of H.264 in mp4, which decord seeks in rightly: against it too, where it is installed."""
    paths = render(folder, arguments, codec="libx264")
    if not has_decord():
        return {"vs_plain_decord": None, "plain_decord": "not installed", **measure(pool, paths, arguments)}
    for path in paths:
        assert np.array_equal(with_pool(pool, [path])[0], with_decord(path))
    return {**measure(pool, paths, arguments, plain_decord=True), "plain_decord": decord_and_version()}


def measure(
    pool: DecodePool, paths: list[Path], arguments: argparse.Namespace, *, plain_decord: bool = False
) -> dict[str, float]:
    """Return how much faster the pool is on some clips than what one would write at first, and all rates."""
    for path in paths:
        assert np.array_equal(with_pool(pool, [path])[0], with_every_frame(path)), (
            f"{path.name}: other frames"
        )
    work = paths * arguments.repeats
    sides: dict[str, Callable[[], object]] = {
        "pool": lambda: with_pool(pool, work),
        "decord": lambda: [with_decord(path) for path in work],
        "every_frame": lambda: [with_every_frame(path) for path in work],
        "picked_first": lambda: [with_every_frame(path, picks_first=True) for path in work],
    }
    if not plain_decord:
        del sides["decord"]
    seconds = medians(interleaved_seconds(sides, arguments.rounds))
    names = {
        "decord": "vs_plain_decord",
        "every_frame": "vs_every_frame",
        "picked_first": "vs_every_frame_picked_first",
    }
    ratios = {names[side]: seconds[side] / seconds["pool"] for side in sides if side != "pool"}
    rates = {f"{side}_clips_per_s": len(work) / seconds[side] for side in sides if side != "picked_first"}
    return ratios | rates


def measure_segments(pool: DecodePool, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return how much faster segments of long videos are prepared together than one by one, by the kind of file."""
    found = {}
    for suffix, codec, times, count in (("mp4", "libx264", 60, 32), ("avi", "mpeg4", 6, 8)):
        clips = []
        for path in render_clips(folder / suffix, count=WORKERS, codec=codec, suffix=suffix):
            film = path.with_name(f"long-{path.name}")
            repeat_clip(path, film, times)
            length_s = times * NUM_FRAMES / 30
            bounds = np.linspace(0, length_s, count, endpoint=False).round(1).tolist()
            segments = [Segment(unit="seconds", start=at, end=at + SEGMENT_S) for at in bounds]
            clips.append(
                [
                    Clip(id=f"{film.name}#{s}", path=film.name, label=0, split="val", segment=s)
                    for s in segments
                ]
            )
        together = partial(prepared, pool, folder / suffix, clips)
        alone = partial(prepared, pool, folder / suffix, [[clip] for film in clips for clip in film])
        for one, other in zip(together(), alone(), strict=True):
            assert one.samples is not None and torch.equal(one.samples, other.samples), one.record
        seconds = medians(interleaved_seconds({"together": together, "alone": alone}, rounds))
        found[suffix] = {
            "vs_one_by_one": seconds["alone"] / seconds["together"],
            "segments_per_s": WORKERS * count / seconds["together"],
            "segments_of_a_video": count,
            "video_s": length_s,
        }
    return found


def prepared(pool: DecodePool, folder: Path, groups: list[list[Clip]]) -> list[PreparedClip]:
    """Clips made ready as `extract` does, each group by one thread."""

    def prepare(group: list[Clip]) -> list[PreparedClip]:
        return prepare_clips(group, folder, tower=VIT_B_16, views=ViewSpec(), decode=pool.frames)

    with ThreadPoolExecutor(WORKERS + 1, initializer=begin_crop_thread, initargs=(False,)) as threads:
        return [clip for group in threads.map(prepare, groups) for clip in group]


def measure_peers(pool: DecodePool, scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Return, for each codec, the figures of every other decoder beside the pool's; and which they are."""
    folders = dict(package.split("=", 1) for package in arguments.package)
    peers = {name: Peer(name, scratch, folders) for name in NAMES}
    found: dict[str, object] = {"peers": {name: peer.served or peer.reason for name, peer in peers.items()}}
    for kind, (codec, suffix) in CODECS.items():
        paths = render_clips(scratch / kind, count=arguments.clips, codec=codec, suffix=suffix)
        found[kind] = beside_peers(pool, paths, peers, arguments)
    for peer in peers.values():
        peer.close()
    return found


def beside_peers(
    pool: DecodePool, paths: list[Path], peers: dict[str, Peer], arguments: argparse.Namespace
) -> dict[str, object]:
    """Return what each peer takes for clips of one kind, and how much faster the pool is; null where it is missing."""
    work = paths * arguments.repeats
    right = [digest(with_every_frame(path)) for path in paths]
    there = {name: peer for name, peer in peers.items() if peer.served}
    equal = {name: peer.decode(paths) == right for name, peer in there.items()}
    sides: dict[str, Callable[[], object]] = {"pool": lambda: with_pool(pool, work)}
    sides |= {name: lambda peer=peer: peer.decode(work) for name, peer in there.items()}  # type: ignore[misc]
    seconds = medians(interleaved_seconds(sides, arguments.rounds))
    found: dict[str, object] = {"pool_clips_per_s": len(work) / seconds["pool"]}
    for name, peer in peers.items():
        if name not in there:
            found |= {f"vs_{name}": None}
            continue
        processor_s = statistics.median(peer.processor_s[-arguments.rounds :])
        found |= {
            f"vs_{name}": seconds[name] / seconds["pool"],
            f"{name}_ms": 1000 * seconds[name] / len(work),
            f"{name}_processor_ms": 1000 * processor_s / len(work),
            f"{name}_frames_are_pyavs": equal[name],
        }
    return found


def choose(count: int) -> np.ndarray:
    """As `extract` does by default."""
    return strided_test_views(count, frames=8, stride=16)


def with_pool(pool: DecodePool, paths: Sequence[Path]) -> list[np.ndarray]:
    """As `extract` does: a thread for each process, and one that takes frames meanwhile."""
    with ThreadPoolExecutor(WORKERS + 1) as threads:
        return list(threads.map(lambda path: collect(pool.frames(path, choose)).view(0), paths))


def with_decord(path: Path) -> np.ndarray:
    reader = load_decord().VideoReader(str(path), num_threads=1)
    frames: np.ndarray = reader.get_batch(choose(len(reader))[0]).asnumpy()
    return frames


def with_every_frame(path: Path, *, picks_first: bool = False) -> np.ndarray:
    """All frames are decoded and kept; made into arrays before those wanted are picked, or after."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    indices = choose(len(frames))[0]
    if picks_first:
        return np.stack([frames[i].to_rgb().to_ndarray() for i in indices])
    picked: np.ndarray = np.stack([frame.to_rgb().to_ndarray() for frame in frames])[indices]
    return picked


if __name__ == "__main__":
    main()
