"""Other decoders, each in a process of its own with one thread, as two of them are imported by one name.

A peer reads a line of JSON with paths, decodes 8 frames of each, and answers with what that took. As a script: the peer.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("decord", "decord2", "torchcodec", "ours")


class Peer:
    """One decoder's process.

    Attributes:
        served: its name and version; None where it cannot be used.
        reason: why not.
        processor_s: of each call so far.
    """

    def __init__(self, name: str, scratch: Path, folders: Mapping[str, str]) -> None:
        paths = [folders[name]] if name in folders else []
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
        if name == "torchcodec":
            links = [*_links_to_pyavs_ffmpeg(scratch), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(links)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.support.decode_peers", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.processor_s: list[float] = []
        first = self._answer()
        self.served, self.reason = first.get("served"), first.get("missing")

    def decode(self, paths: Sequence[Path]) -> list[str]:
        """Have it decode. Returns: a digest of each clip's frames."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(path) for path in paths]) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.processor_s.append(answer["processor_s"])
        return list(answer["digests"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def digest(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()


def _links_to_pyavs_ffmpeg(scratch: Path) -> list[str]:
    """Return folders of the FFmpeg that PyAV brings, under its usual names: torchcodec brings none, and all use one version."""
    import av

    libraries = Path(av.__file__).parent.parent / "av.libs"
    folder = scratch / "ffmpeg"
    folder.mkdir(exist_ok=True)
    for file in libraries.glob("lib*-*.so.*"):
        name, _, versions = file.name.partition(".so.")
        link = folder / f"{name.rpartition('-')[0]}.so.{versions.split('.')[0]}"
        if not link.exists():
            link.symlink_to(file)
    return [str(folder), str(libraries)]


def _reader(name: str) -> tuple[str, Callable[[str], np.ndarray]]:
    """Return a decoder's name and version, and what decodes with it."""
    from evl_cache.sampling import strided_test_views

    def choose(count: int) -> np.ndarray:
        return strided_test_views(count, frames=8, stride=16)

    if name == "ours":
        import av

        from evl_cache.video import decode_clip

        return f"PyAV {av.__version__}", lambda path: decode_clip(path, choose).view(0)
    if name == "torchcodec":
        import torch
        import torchcodec
        from torchcodec.decoders import VideoDecoder

        torch.set_num_threads(1)
        try:
            VideoDecoder(b"no video")  # it says only now that FFmpeg is missing
        except (RuntimeError, ValueError) as error:
            if "Could not load libtorchcodec" in str(error):
                raise

        def by_torchcodec(path: str) -> np.ndarray:
            reader = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            frames: np.ndarray = reader.get_frames_at(choose(len(reader))[0].tolist()).data.numpy()
            return frames

        return f"torchcodec {torchcodec.__version__}", by_torchcodec
    from evl_cache.video.which_decord import decord_and_version, decord_package, load_decord

    decord = load_decord()
    if decord_package() != name:
        raise ImportError(f"{decord_and_version()} is installed in its place")

    def by_decord(path: str) -> np.ndarray:
        reader = decord.VideoReader(path, num_threads=1)
        frames: np.ndarray = reader.get_batch(choose(len(reader))[0]).asnumpy()
        return frames

    return decord_and_version(), by_decord


def _main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        served, read = _reader(name)
    except (ImportError, RuntimeError, OSError) as error:
        answer(missing=f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return
    answer(served=served)
    for line in sys.stdin:
        start = time.process_time()
        clips = [read(path) for path in json.loads(line)]
        took = time.process_time() - start
        answer(processor_s=took, digests=[digest(clip) for clip in clips])


if __name__ == "__main__":
    _main(sys.argv[1])
