"""A reader of many shards: a bounded number of open files, any number of threads, forks at any time."""

import contextlib
import os
import pickle
import resource
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.store import FeatureCache
from evl_cache.store.shards.shard_pool import ShardPool
from tests.support.store_helpers import extract_small, load_clips, small_spec, small_tower
from tests.support.warm_python import warm_python

FORKING = """
import os, sys, threading, time
from evl_cache.store import FeatureCache
cache = FeatureCache(sys.argv[1])
valid = [int(sample) for sample in cache.is_valid.nonzero()[0]]
expected = [cache.read([sample])[0][0] for sample in valid]
stop = threading.Event()
def busy():
    while not stop.is_set():
        for sample in valid:
            cache.read([sample])
threads = [threading.Thread(target=busy) for _ in range(2)]
[thread.start() for thread in threads]
codes = []
for _ in range(20):  # while the threads hold the pool's lock now and then
    child = os.fork()
    if child == 0:
        equal = all(cache.read([s])[0][0].equal(e) for s, e in zip(valid, expected))
        os._exit(0 if equal else 3)
    deadline = time.monotonic() + 100
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    codes.append("hangs" if ended == (0, 0) else os.waitstatus_to_exitcode(ended[1]))
    if ended == (0, 0):
        os.kill(child, 9)
        break
stop.set()
[thread.join() for thread in threads]
assert set(codes) == {0}, codes
"""


@pytest.fixture(scope="module")
def cache(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight blocks of one clip: 48 shards."""
    path = tmp_path_factory.mktemp("pool") / "cache"
    clips = load_clips(motions)
    extract_small(clips, path, spec=small_spec(clips, small_tower(motions), block_clips=1))
    return path


def open_files(path: Path) -> int:
    """How many files below `path` this process holds open; a mapped one has two descriptors."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return sum(name.startswith(f"{path}/") for name in found)


def limited(path: Path, limit: int) -> FeatureCache:
    opened = FeatureCache(path)
    opened._samples.shards = ShardPool(limit=limit)
    return opened


def valid_samples(opened: FeatureCache) -> list[int]:
    return [int(sample) for sample in np.flatnonzero(opened.is_valid)]


def test_no_more_files_are_open_than_allowed(cache: Path) -> None:
    opened = limited(cache, limit=7)
    for sample in valid_samples(opened) * 2:
        opened.read([sample])
        assert open_files(cache) <= 7 + 1  # the index, as long as the cache is open
    assert open_files(cache) == 7 + 1
    del opened
    assert open_files(cache) == 0  # at once, not when garbage is collected next


def test_without_a_limit_of_its_own_it_stays_far_below_the_process_limit() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 16 <= ShardPool().limit <= max(16, soft // 8)


def test_threads_share_a_small_pool_and_read_right_values(cache: Path) -> None:
    opened = limited(cache, limit=3)
    samples = valid_samples(opened)
    expected = {sample: FeatureCache(cache).read([sample]) for sample in samples}

    def reads(seed: int) -> bool:
        order = np.random.default_rng(seed).choice(samples, 60)
        return all(_equal(opened.read([int(sample)]), expected[int(sample)]) for sample in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(reads, range(4)))


def _equal(found: object, expected: object) -> bool:
    tokens, maps = found  # type: ignore[misc]
    right_tokens, right_maps = expected  # type: ignore[misc]
    return all(map(torch.equal, [*tokens, *maps], [*right_tokens, *right_maps]))


def test_a_cache_that_was_read_can_be_pickled(cache: Path) -> None:
    opened = FeatureCache(cache)
    expected = opened.read([0])
    assert _equal(pickle.loads(pickle.dumps(opened)).read([0]), expected)


def test_children_forked_while_threads_read_get_right_values(cache: Path) -> None:
    done = subprocess.run(
        [warm_python(), "-W", "ignore", "-c", FORKING, str(cache)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
