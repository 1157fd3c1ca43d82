"""What copies of remote caches take on the disk, against their limit: removed files count as long as the disk has them."""

import contextlib
import fcntl
import mmap
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.feature_caches import TOWER, write_cache
from tests.support.servers import FaultyServer, faulty_server
from tests.support.warm_python import warm_python

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.store import FeatureCache
from evl_cache.store.reading import copy_root
from evl_cache.store.reading.copy_root import ACCOUNT_NAME, CopyRoot

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
    root._unseen_nbytes = 2
    with root._alone(lambda: None):
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


def descriptors_of_all() -> Iterator[str]:
    """Every open file of every process, by its path under /proc."""
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is of another user
            yield from [f"/proc/{process}/fd/{number}" for number in os.listdir(f"/proc/{process}/fd")]


def taken_by_shards(home: Path) -> int:
    """Bytes that shard files below a place have on the disk, those included that have no name and are open somewhere."""
    found: dict[int, int] = {}
    for path in home.rglob("c.*"):
        with contextlib.suppress(OSError):
            found[path.lstat().st_ino] = path.lstat().st_blocks
    for descriptor in descriptors_of_all():
        with contextlib.suppress(OSError):  # closed meanwhile
            if (
                os.readlink(descriptor).startswith(f"{home}/")
                and (status := os.stat(descriptor)).st_nlink == 0
            ):
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


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="only Linux tells which removed files are open"
)
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


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="only Linux tells which removed files are open"
)
def test_pieces_that_are_written_by_whole_pages_are_counted_as_they_lie(
    server: FaultyServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 9_000_000
    monkeypatch.setenv("EVL_CACHE_COPY_GB", str(limit / 1e9))
    server.root = tmp_path
    write_cache(
        tmp_path / "b", labels=[i % 3 for i in range(SAMPLES)], tower=LARGE, codec="raw", block_clips=12
    )
    with Watch(home) as watch, running(EPOCHS, tmp_path / "b", f"{server.url}/b", 1, 1) as process:
        request, nbytes = ended(process)
    assert request > 4 << 20 and limit // 2 < watch.most <= limit + request and nbytes > 2 * limit


def test_files_that_others_remove_while_they_are_read_cost_requests_and_nothing_else(
    cache: Path, server: FaultyServer, home: Path
) -> None:
    with running(REMOVER, home) as remover:
        assert remover.stdout is not None and remover.stdout.readline() == "ready\n"
        with (
            running(EPOCHS, cache, f"{server.url}/a", 1) as one,
            running(EPOCHS, cache, f"{server.url}/a", 2) as two,
        ):
            results = [ended(one), ended(two)]
    assert min(nbytes for _, nbytes in results) > 1.5 * sum(f.stat().st_size for f in cache.glob("*/c.*"))


def test_a_shard_that_is_held_is_not_removed_and_gives_its_blocks_back_when_it_is_while_others_have_it_open(
    cache: Path, server: FaultyServer, home: Path
) -> None:
    remote, other = FeatureCache(f"{server.url}/a"), FeatureCache(f"{server.url}/a")
    expected = FeatureCache(cache).read([0])
    assert remote.copy is not None and other.copy is not None
    for opened in (remote, other):
        opened.read([0])
    held = remote.copy.shards.hold("tokens", 0, range(3))
    inode = held.path.stat().st_ino
    root = CopyRoot(limit_nbytes=1)
    with mapped(held.path) as still_open, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copy_root, "_PATIENCE_S", 0.0)
        with root.room(1):
            assert held.path.exists() and not list(remote.path.glob("maps/c.*"))
        held.release()
        with root.room(1):
            assert not held.path.exists() and os.fstat(still_open).st_blocks == 0
            assert os.fstat(still_open).st_ino == inode
    for opened in (remote, other):  # what they have open is no more: they see it and fetch again
        found = opened.read([0])
        assert all(map(torch.equal, found[0], expected[0])) and found[1] is not None
        assert all(map(torch.equal, found[1], expected[1] or ()))


def test_a_shard_that_has_a_name_elsewhere_stays_whole_there(
    server: FaultyServer, home: Path, tmp_path: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    remote.read([0])
    (shard,) = remote.path.glob("maps/c.*")
    kept, content = tmp_path / "kept", shard.read_bytes()
    kept.hardlink_to(shard)
    with CopyRoot(limit_nbytes=1).room(1):
        pass
    assert not shard.exists() and kept.read_bytes() == content


def test_where_all_is_held_one_request_goes_over_the_limit_after_a_while(
    server: FaultyServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_root, "_PATIENCE_S", 0.05)
    remote = FeatureCache(f"{server.url}/a")
    assert remote.copy is not None
    held = remote.copy.shards.hold("maps", 0, range(3))
    root, entered = CopyRoot(limit_nbytes=1), 0
    with root.room(1_000_000):
        entered += 1
    assert entered and held.path.exists()
    held.release()


def test_who_waits_for_room_goes_on_when_a_reader_lets_go(server: FaultyServer, home: Path) -> None:
    remote = FeatureCache(f"{server.url}/a")
    assert remote.copy is not None
    held = remote.copy.shards.hold("maps", 0, range(3))
    root, has_room = CopyRoot(limit_nbytes=LIMIT), threading.Event()

    def wait() -> None:
        with root.room(LIMIT):
            has_room.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not has_room.wait(0.1)
    held.release()
    thread.join(timeout=60)
    assert has_room.is_set() and not held.path.exists()


def test_a_process_that_stands_still_with_the_account_stops_no_other(
    cache: Path, server: FaultyServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_root, "_LOCK_PATIENCE_S", 0.05)
    with (home / ACCOUNT_NAME).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tokens, _ = FeatureCache(f"{server.url}/a").read([0])
    assert all(map(torch.equal, tokens, FeatureCache(cache).read([0])[0]))


def test_an_account_that_a_dead_process_left_too_high_is_taken_anew(server: FaultyServer, home: Path) -> None:
    remote = FeatureCache(f"{server.url}/a")
    remote.read([0])
    (home / ACCOUNT_NAME).write_text(f"{10**15:020d}\n")
    remote.read([23])
    assert int((home / ACCOUNT_NAME).read_text()) == taken_by_shards(home) < LIMIT
    assert len(list(remote.path.glob("maps/c.*"))) == 2  # nothing was removed


def test_the_default_limit_does_not_shrink_by_its_own_copies(
    cache: Path, server: FaultyServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVL_CACHE_COPY_GB")
    size = 20_000_000
    usage = lambda path: shutil._ntuple_diskusage(size, taken_by_shards(home), size - taken_by_shards(home))  # type: ignore[attr-defined] # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert CopyRoot().limit_nbytes == size // 2
    FeatureCache(f"{server.url}/a").read(range(12))
    assert taken_by_shards(home) > size // 4 and CopyRoot().limit_nbytes == size // 2


def test_what_is_fetched_ahead_and_not_read_yet_is_a_share_of_the_limit(
    server: FaultyServer, home: Path
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    assert remote.copy is not None
    shards = remote.copy.shards
    wanted = [(block, range(3 * row, 3 * row + 3)) for block in range(8) for row in range(3)]
    shards.prefetch(wanted, ["tokens"])
    asked = sum(nbytes for _, nbytes in shards._ahead.values())
    assert 0 < len(shards._ahead) < 8 and asked <= LIMIT // 8
    for block, chunks in wanted[:3]:
        shards.hold("tokens", block, chunks).release()
    before = set(shards._ahead)
    shards.prefetch(wanted, ["tokens"])
    assert set(shards._ahead) - before  # what was read makes way for more


@pytest.mark.parametrize("damage", ["cut", "index"])
def test_a_copy_whose_file_is_damaged_beside_its_chunks_heals(
    cache: Path, server: FaultyServer, home: Path, damage: str
) -> None:
    url, expected = f"{server.url}/a", FeatureCache(cache).read([1])[0]
    remote = FeatureCache(url)
    remote.read([1])
    shard = remote.path / "tokens" / "c.0.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    for opened in (FeatureCache(url), remote):
        assert all(map(torch.equal, opened.read([1])[0], expected))


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[int]:
    """Have a file open and mapped, as who reads it has; yields a descriptor."""
    descriptor = os.open(path, os.O_RDONLY)
    pages = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    try:
        yield descriptor
    finally:
        pages.close()
        os.close(descriptor)
