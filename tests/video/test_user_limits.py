"""Where a shell or a cluster limits processes, decoding works within the limit, or says that it is the limit's fault."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from evl_cache.video import user_limits
from evl_cache.video.user_limits import MOST_ADDRESS_SPACE, limit_address_space, memory_limit, refused
from tests.support.example_data import ROOT

MB = 1 << 20
DECODE = """
import json, resource, sys
import numpy as np
from evl_cache.errors import EvlCacheError
from evl_cache.video.pool import DecodePool

kind, soft, hard, *paths = sys.argv[1:]
resource.setrlimit(getattr(resource, kind), (int(soft), int(hard)))
with DecodePool(1) as pool:
    for path in paths:
        try:
            shapes = [e.shape for e in pool.frames(path, lambda n: np.arange(n)[None]) if isinstance(e, np.ndarray)]
            print("frames", sum(shape[0] for shape in shapes))
        except EvlCacheError as error:
            print(type(error).__name__, error)
"""


def write_video(path, *, size, frames):
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for number in range(frames):
            picture = np.full((height, width, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    small = write_video(folder / "small.mp4", size=(64, 48), frames=5)
    return small, write_video(folder / "large.mp4", size=(3840, 2160), frames=12)


def decode(kind: str, limit: tuple[int, int], *paths: Path) -> list[str]:
    """Decode in a process of its own under a limit. Returns: a line for each file."""
    done = subprocess.run(
        [sys.executable, "-c", DECODE, kind, *map(str, limit), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_under_a_hard_limit_below_ours_clips_are_decoded(videos):
    small, _ = videos
    assert decode("RLIMIT_AS", (8000 * MB, 8000 * MB), small) == ["frames 5"]


def test_a_clip_that_needs_more_than_the_user_allows_is_not_at_fault(videos):
    small, large = videos
    first, second, third = decode("RLIMIT_AS", (300 * MB, -1), small, large, small)
    assert (first, third) == ("frames 5", "frames 5")
    assert second == (
        f"Outage {large}: needs more memory than the 300 MB of a process; "
        "raise the limit (ulimit -v), or move the file away if it alone is at fault"
    )


def test_a_decoder_that_cannot_start_names_the_limit(videos):
    small, _ = videos
    (line,) = decode("RLIMIT_AS", (170 * MB, 170 * MB), small)
    assert "ulimit -v gives each process 170 MB" in line or "(ulimit -v)" in line


def test_frames_larger_than_files_may_be_are_no_clips_fault(videos):
    _, large = videos
    (line,) = decode("RLIMIT_FSIZE", (100_000, 100_000), large)
    assert line == (
        f"Outage {large}: files may have 100000 bytes, a clip's frames need more; raise the limit (ulimit -f)"
    )


def test_a_soft_limit_on_files_does_not_stop_a_worker(videos):
    small, _ = videos
    assert decode("RLIMIT_FSIZE", (100, -1), small) == ["frames 5"]


@pytest.mark.parametrize(
    ("user", "given"),
    [
        ((-1, -1), (MOST_ADDRESS_SPACE, -1)),
        ((900 * MB, -1), (900 * MB, -1)),
        ((900 * MB, 900 * MB), (900 * MB, 900 * MB)),
        ((64 << 30, 32 << 30), (MOST_ADDRESS_SPACE, 32 << 30)),
    ],
)
def test_the_least_limit_counts(monkeypatch, user, given):
    taken = []
    monkeypatch.setattr(user_limits.resource, "getrlimit", lambda kind: user)
    monkeypatch.setattr(user_limits.resource, "setrlimit", lambda kind, limits: taken.append((kind, limits)))
    limit_address_space()
    assert taken == [(resource.RLIMIT_AS, given)]


def test_without_a_limit_of_the_users_nothing_is_laid_on_it(monkeypatch):
    monkeypatch.setattr(user_limits.resource, "getrlimit", lambda kind: (MOST_ADDRESS_SPACE, -1))
    assert memory_limit() is None
    assert refused(MemoryError()) is None and refused(RuntimeError("can't start new thread")) is None


def test_a_command_without_memory_for_its_libraries_ends_with_one_line():
    command = f"ulimit -v 300000; exec {sys.executable} -m evl_cache_cli info nothing"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and done.stderr.startswith("error: no memory for a library (")
    assert done.stderr.endswith("raise the limit of memory of a process (ulimit -v)\n")
    assert len(done.stderr.splitlines()) == 1
