"""A remote cache in other processes: workers of torch's DataLoader by every way to start them, and forks at any moment."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from tests.support.feature_caches import write_cache
from tests.support.servers import FaultyServer, faulty_server
from tests.support.warm_python import warm_python

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.errors import CacheError, Unreachable, WaitEnded
from evl_cache.store import FeatureCache, waits_end_when
from evl_cache.store.reading.fetched_shards import Piece

SAMPLES = 40
# The cache was opened and read in the parent: connections are open, and threads have run.
LOADING = """
import sys
import torch
from torch.utils.data import DataLoader
from evl_cache.store import FeatureCache
local, remote = FeatureCache(sys.argv[1]), FeatureCache(sys.argv[2])
remote.read([0, 39])
loader = DataLoader(
    range(len(remote)), batch_size=4, collate_fn=remote.read,
    num_workers=2, multiprocessing_context=sys.argv[3], persistent_workers=True,
)
for _ in range(2):
    for number, found in enumerate(loader):
        expected = local.read(range(4 * number, 4 * number + 4))
        assert all(torch.equal(a, b) for one, two in zip(found, expected) for a, b in zip(one, two))
    assert number == 9
"""
# Children are forked while threads fetch, write, hold shards and are ahead, with all that they lock.
FORKING = """
import os, sys, threading, time
import numpy as np, torch
from evl_cache.store import FeatureCache
from evl_cache.store.reading.copy_root import CopyRoot
local, remote = FeatureCache(sys.argv[1]), FeatureCache(sys.argv[2])
expected = local.read(range(40))
def reads_right(cache, samples):
    found = cache.read(samples)
    return all(torch.equal(a, b[list(samples)]) for one, two in zip(found, expected) for a, b in zip(one, two))
stop, wrong = threading.Event(), []
def busy(seed):
    generator = np.random.default_rng(seed)
    buffers = remote.buffers(slots=4)
    while not stop.is_set():
        samples = generator.permutation(40)
        remote.prefetch(buffers, samples[:16].tolist())
        wrong.extend(s for s in samples[:4].tolist() if not reads_right(remote, [s]))
threads = [threading.Thread(target=busy, args=(seed,)) for seed in range(3)]
[thread.start() for thread in threads]
codes = []
for number in range(40):
    child = os.fork()
    if child == 0:
        os._exit(0 if reads_right(remote, [(number + step) % 40 for step in (0, 7, 14)]) else 3)
    deadline = time.monotonic() + 100
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    codes.append("hangs" if ended == (0, 0) else os.waitstatus_to_exitcode(ended[1]))
    if ended == (0, 0):
        os.kill(child, 9)
        break
stop.set()
[thread.join() for thread in threads]
assert set(codes) == {0} and not wrong, (codes, wrong)
"""
# A server is silent, and the process has read all that it wants.
ENDING = """
import sys
from evl_cache.store import FeatureCache
remote = FeatureCache(sys.argv[1])
remote.prefetch(remote.buffers(slots=4), range(4))
print("asked", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "a"
    write_cache(path, labels=[i % 3 for i in range(SAMPLES)])
    return path


@pytest.fixture
def server(cache: Path) -> Iterator[FaultyServer]:
    with faulty_server(cache.parent) as found:
        yield found


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    return tmp_path / "copies"


def run(python: str, code: str, *words: object) -> None:
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("method", "gb"), [("fork", None), ("fork", "0.0001"), ("spawn", None), ("forkserver", None)]
)
def test_workers_of_a_data_loader_read_what_the_local_cache_has(
    cache: Path, server: FaultyServer, method: str, gb: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gb is not None:
        monkeypatch.setenv("EVL_CACHE_COPY_GB", gb)
    run(warm_python() if method == "fork" else sys.executable, LOADING, cache, f"{server.url}/a", method)


def test_children_forked_while_threads_fetch_and_make_room_read_the_right_values(
    cache: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_GB", str(100_000 / 1e9))
    run(warm_python(), FORKING, cache, f"{server.url}/a")


class Silence:
    """A server that does not answer for some paths until `end`."""

    def __init__(self, server: FaultyServer, *, part: str) -> None:
        self.asked, self.ended = threading.Event(), threading.Event()
        self._part, self._before = part, server.fault
        server.fault = self._fault

    def end(self) -> None:
        self.ended.set()

    def _fault(self, path: str, body: bytes) -> bytes | int | None:
        if self._part in path:
            self.asked.set()
            assert self.ended.wait(300)
        return self._before(path, body)


@pytest.fixture
def silence(server: FaultyServer) -> Iterator[Silence]:
    """No features come, until it ends."""
    found = Silence(server, part="/c.")
    yield found
    found.end()


@pytest.mark.parametrize("end", ["end_waits", "close"])
def test_who_waits_for_features_is_called_away_and_may_ask_again(
    cache: Path, server: FaultyServer, silence: Silence, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    copy = remote.copy
    assert copy is not None
    caught: list[BaseException] = []
    # More than there are threads that fetch: some pieces wait for their turn.
    samples, all_wait, fetching = range(0, SAMPLES, 2), threading.Event(), copy.shards._fetching
    last = len(samples) * len(remote.buffers(slots=1).stacked)
    calls = itertools.count(1)

    def counted(piece: Piece) -> Future[None]:
        found = fetching(piece)
        if next(calls) == last:
            all_wait.set()
        return found

    monkeypatch.setattr(copy.shards, "_fetching", counted)

    def read(sample: int) -> None:
        try:
            remote.read([sample])
        except CacheError as error:
            caught.append(error)

    threads = [threading.Thread(target=read, args=(sample,)) for sample in samples]
    for thread in threads:
        thread.start()
    assert all_wait.wait(60) and silence.asked.wait(60)
    started = time.monotonic()
    remote.end_waits() if end == "end_waits" else copy.close()
    for thread in threads:
        thread.join(timeout=60)
    assert time.monotonic() - started < 15 and not any(thread.is_alive() for thread in threads)
    assert len(caught) == len(threads) and all(isinstance(error, WaitEnded) for error in caught)
    silence.end()
    assert all(map(torch.equal, remote.read([4])[0], FeatureCache(cache).read([4])[0]))


def test_who_waits_for_the_same_rows_of_the_index_is_called_away_at_once_with_the_others(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FeatureCache(f"{server.url}/a")
    assert remote.copy is not None
    silence = Silence(server, part="/index.bin")
    window, calls, all_wait = remote.copy._index_copy._window, itertools.count(1), threading.Event()
    caught: list[BaseException] = []

    def counted(start: int, nbytes: int) -> tuple[int, int]:
        if next(calls) == 4:
            all_wait.set()
        return window(start, nbytes)

    def read(sample: int) -> None:
        try:
            remote.read([sample])
        except CacheError as error:
            caught.append(error)

    monkeypatch.setattr(remote.copy._index_copy, "_window", counted)
    threads = [threading.Thread(target=read, args=(sample,)) for sample in (0, 10, 20, 30)]  # in four blocks
    for thread in threads:
        thread.start()
    try:
        assert all_wait.wait(60) and silence.asked.wait(60)
        remote.end_waits()
        for thread in threads:
            thread.join(timeout=20)
        assert [type(error) for error in caught] == [WaitEnded] * 4
    finally:
        silence.end()
        for thread in threads:
            thread.join(timeout=60)


def test_a_cache_whose_opening_is_ended_while_the_index_does_not_come_is_not_opened_by_its_marks(
    server: FaultyServer,
) -> None:
    silence = Silence(server, part="/index.bin")
    try:
        with waits_end_when(silence.asked.is_set), pytest.raises(WaitEnded):
            FeatureCache(f"{server.url}/a")
        assert not [path for path in server.asked if "/done/" in path]
    finally:
        silence.end()


def test_a_cache_that_cannot_be_looked_at_again_is_not_said_to_have_changed(server: FaultyServer) -> None:
    remote = FeatureCache(f"{server.url}/a")
    server.fault = lambda path, body: {"manifest.json": 403}.get(path.rpartition("/")[2], 404)
    with pytest.raises(Unreachable, match=r"manifest\.json: access denied"):
        remote.read([0])


def test_a_process_ends_while_what_it_fetches_ahead_does_not_come(
    server: FaultyServer, silence: Silence
) -> None:
    with subprocess.Popen(
        [warm_python(), "-W", "ignore", "-c", ENDING, f"{server.url}/a"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "asked\n"
        assert silence.asked.wait(60)
        assert process.communicate("\n", timeout=60)[0] == "" and process.returncode == 0


def test_where_one_file_of_a_description_is_missing_the_others_are_not_waited_for(
    server: FaultyServer,
) -> None:
    server.fault = lambda path, body: 404 if path.endswith(("index.bin", "done/000003.json")) else None
    silence = Silence(server, part="done/000000.json")
    try:
        started = time.monotonic()
        with pytest.raises(CacheError, match=r"000003\.json: no such file, though the manifest names it"):
            FeatureCache(f"{server.url}/a")
        assert silence.asked.is_set() and time.monotonic() - started < 20
    finally:
        silence.end()
