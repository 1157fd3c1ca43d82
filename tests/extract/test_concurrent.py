"""Many processes on one cache while it grows: what is written is what one process writes, what is read is right.

The suite fills one cache, `make soak` one after another for EVL_CACHE_CONCURRENT_S seconds.
"""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evl_cache.store import FeatureCache, verify_cache
from tests.support.extraction_server import Server
from tests.support.growing_cache import Readers, write_expected
from tests.support.store_helpers import differences, make_clips, tree

CLIPS, EXTRACTORS, READERS = 16, 4, 8
CLIP_S, KILL_EVERY_S, EXPIRY_S = 0.3, 0.8, 0.5
SOAK_S = float(os.environ.get("EVL_CACHE_CONCURRENT_S", "60"))
JOB = {"spec": {"block_clips": 2}, "options": {"lock_expiry_s": EXPIRY_S}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("many")
    make_clips(folder, CLIPS)
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one process that nobody disturbed."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    assert server.run(cache, **JOB).code == 0
    return cache


def grow(server: Server, cache: Path, rng: random.Random) -> int:
    """Four processes extract; one of them is killed now and then, and another takes its place. Returns: kills."""
    pids = [server.start(cache, clip_s=CLIP_S, **JOB) for _ in range(EXTRACTORS)]
    kills = 0
    while not (cache / "manifest.json").exists():
        time.sleep(KILL_EVERY_S * rng.uniform(0.8, 1.2))
        victim = rng.randrange(EXTRACTORS)
        os.kill(pids[victim], signal.SIGKILL)
        kills += server.wait(pids[victim]).code == -signal.SIGKILL
        pids[victim] = server.start(cache, clip_s=CLIP_S, **JOB)
    for pid in pids:
        assert server.wait(pid).code == 0
    return kills


@pytest.mark.parametrize(
    "seconds", [0.0, pytest.param(SOAK_S, marks=pytest.mark.soak)], ids=["suite", "soak"]
)
def test_readers_and_extractors_that_are_killed_share_a_growing_cache(
    server: Server, alone: Path, tmp_path: Path, seconds: float
) -> None:
    write_expected(FeatureCache(alone), tmp_path / "expected.npz")
    until = time.monotonic() + seconds
    for number in itertools.count():
        cache, folder = tmp_path / f"cache{number}", tmp_path / f"readers{number}"
        folder.mkdir()
        readers = Readers(cache, tmp_path / "expected.npz", folder, count=READERS)  # wait until it is there
        kills = grow(server, cache, random.Random(number))
        seen = readers.stop()
        assert [reader.error for reader in seen] == [""] * READERS
        assert {reader.valid_at_end for reader in seen} == {CLIPS - 1}  # one video is broken
        assert min(reader.reads for reader in seen) >= CLIPS
        assert min(reader.growths for reader in seen) >= 1
        assert sum(reader.growths for reader in seen) > 2 * READERS
        assert kills >= 1
        assert differences(tree(cache), tree(alone)) == []
        assert verify_cache(cache).problems == ()
        if time.monotonic() >= until:
            break
