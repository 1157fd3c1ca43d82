"""What copies of remote caches take on the disk, against their limit: removed files count as long as the disk has them."""

import contextlib
import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.feature_caches import TOWER, write_cache
from tests.support.servers import FaultyServer, faulty_server
from tests.support.warm_python import warm_python

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.store import FeatureCache
from evl_cache.store.reading import copy_root
from evl_cache.store.reading.copy_root import ACCOUNT_NAME, MARKER_NAME, CopyRoot

SAMPLES, LIMIT = 24, 3_000_000
LARGE = replace(TOWER, image_size=112, width=64)  # 140 kB of tokens and 460 kB of maps a sample
# Every batch of three epochs is compared with the local cache; the piece is what one request brings at most.
EPOCHS = """
import sys
import numpy as np, torch
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.store import FeatureCache
from evl_cache.store.reading import fetched_shards
local, remote = FeatureCache(sys.argv[1]), FeatureCache(sys.argv[2])
if len(sys.argv) > 4:
    fetched_shards._PIECES_OF_LIMIT = int(sys.argv[4])
shard_room, most = fetched_shards.SparseShard.room_for, [0]
def room_for(shard, first, stop):
    room = shard_room(shard, first, stop)
    most[0] = max(most[0], room)
    return room
fetched_shards.SparseShard.room_for = room_for
loader = FeatureLoader(remote, np.arange(len(remote)), layers=(2, 3, 4), batch=4, shuffle_seed=int(sys.argv[3]))
for epoch in range(3):
    for batch in loader.epoch(epoch):
        for found, expected in zip(batch.features.dequantized(), local.read(batch.samples), strict=True):
            assert all(map(torch.equal, found, expected)), "other features"
print(most[0], remote.copy.nbytes)
"""
# Makes room for everything there is, again and again, as a process with a tiny limit would.
REMOVER = """
import sys, time
from pathlib import Path
from evl_cache.store.reading.copy_root import CopyRoot
root = CopyRoot(Path(sys.argv[1]), limit_nbytes=1)
print("ready", flush=True)
while True:
    root._has_looked = False
    with root._alone():
        root._taken_beside(1)
    time.sleep(0.002)
"""


@pytest.fixture(scope="module", params=["default", "raw"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "a"
    labels = [i % 3 for i in range(SAMPLES)]
    write_cache(path, labels=labels, tower=LARGE, codec=request.param, block_clips=3)
    return path


@pytest.fixture
def server(cache: Path) -> Iterator[FaultyServer]:
    with faulty_server(cache.parent) as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "home"))
    monkeypatch.setenv("EVL_CACHE_COPY_GB", str(LIMIT / 1e9))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def taken_by_shards(home: Path) -> int:
    """Bytes that shard files below a place have on the disk, those included that have no name and are open somewhere."""
    found: dict[int, int] = {}
    for path in home.rglob("c.*"):
        with contextlib.suppress(OSError):
            found[path.lstat().st_ino] = path.lstat().st_blocks
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or of another user
            if os.readlink(descriptor).startswith(f"{home}/") and (status := os.stat(descriptor)).st_nlink == 0:
                found[status.st_ino] = status.st_blocks
    return 512 * sum(found.values())


class Watch:
    """The most that was taken at any look. Nobody writes or removes files during a look, as it takes their lock."""

    def __init__(self, home: Path) -> None:
        self.most, self.looks = 0, 0
        self._home, self._stop = home, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with (self._home / ACCOUNT_NAME).open("a") as file:
            while not self._stop.wait(0.01):
                fcntl.flock(file, fcntl.LOCK_EX)
                self.most = max(self.most, taken_by_shards(self._home))
                self.looks += 1
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def running(code: str, *words: object) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [warm_python(), "-W", "ignore", "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def ended(process: "subprocess.Popen[str]") -> list[int]:
    """Numbers that it printed."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [int(word) for word in out.split()]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells which removed files are open")
def test_two_processes_take_at_most_the_limit_and_one_request_over_three_epochs(
    cache: Path, server: FaultyServer, home: Path
) -> None:
    whole = sum(f.stat().st_size for f in cache.glob("*/c.*"))
    url = f"{server.url}/a"
    with Watch(home) as watch, running(EPOCHS, cache, url, 1) as one, running(EPOCHS, cache, url, 2) as other:
        results = [ended(one), ended(other)]
    request = max(most for most, _ in results)
    assert watch.looks > 5 and LIMIT // 2 < watch.most <= LIMIT + request and request < LIMIT // 2
    assert sum(nbytes for _, nbytes in results) > 2 * whole > 4 * LIMIT  # so much was removed meanwhile
    with CopyRoot().room(0):
        pass
    assert int((home / ACCOUNT_NAME).read_text()) == taken_by_shards(home)
