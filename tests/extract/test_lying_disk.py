"""The commands on disks that fail and lie: what they end with is the same as on an honest one, or they stop clearly."""

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from evl_cache.caches.share import pull
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import repair
from evl_cache.runs.directory import RunFile
from evl_cache.store import FeatureCache, verify_cache
from evl_cache.train import TrainOptions, train
from tests.support.disk_schedules import JOB, Bench, check_files, made_bench, run_seed
from tests.support.feature_caches import write_pair
from tests.support.lying_disk import NO_HARD_LINKS, SLOW_CLOSE, LyingDisk, needs_lying_disks
from tests.support.store_helpers import one_thread, small_tower

IN_THE_SUITE, ALL = 8, 200
ONLY = int(os.environ["EVL_CACHE_DISK_SCHEDULE"]) if "EVL_CACHE_DISK_SCHEDULE" in os.environ else None
SWITCHES: dict[str, tuple[tuple[Any, ...], dict[str, bool]]] = {
    "silly renames": ((), {"silly_rename": True}),
    "stale handles": ((), {"stale": True}),
    "no hard links": ((NO_HARD_LINKS,), {}),
    "no mmap": ((), {"no_mmap": True}),
    "no case": ((), {"ignores_case": True}),
    "slow close": ((SLOW_CLOSE,), {}),
    "attributes remembered": ((), {}),
    "all of NFS": ((), {"silly_rename": True, "stale": True, "no_mmap": True}),
}
TRAINING = TrainOptions(head="linear", epochs=1, batch=4, lr=3e-3, seed=5, shuffle_blocks=0)
REMEMBER = ("attributes remembered", "all of NFS")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    needs_lying_disks()
    with made_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(params=SWITCHES)
def disks(request: pytest.FixtureRequest, bench: Bench) -> Iterator[tuple[LyingDisk, LyingDisk]]:
    """The disks of two jobs, with a switch on."""
    faults, switches = SWITCHES[request.param]
    disks = bench.clients if request.param in REMEMBER else (bench.honest, bench.honest)
    for disk in disks:
        disk.set(*faults, **switches)
    yield disks
    for disk in disks:
        disk.clear()


def test_two_jobs_a_kill_and_a_resume_then_verify_repair_and_pull(
    bench: Bench, disks: tuple[LyingDisk, LyingDisk], request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    pids = [bench.server.start(disk.path / name, **JOB) for disk in disks]
    time.sleep(random.Random(name).random() * bench.seconds)
    os.kill(pids[0], signal.SIGKILL)
    bench.server.wait(pids[0])
    assert bench.server.wait(pids[1]).report.get("digest")
    assert bench.server.run(disks[0].path / name, **JOB).report.get("digest")
    check_files(bench, name)

    cache = disks[1].path / name
    assert verify_cache(cache).problems == ()
    (shard,) = (bench.folder / name / "tokens").glob("c.0.*")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert verify_cache(cache).problems
    with one_thread():
        clips = bench.server.folder
        options = ExtractOptions(decode_workers=1, batch=4)
        repaired = repair(cache, tower=lambda _: small_tower(clips), root=clips, options=options, threads=1)
    assert repaired.blocks_redone == (0,)
    check_files(bench, name)

    pull(str(cache), str(disks[0].path / f"{name}-pulled"))
    check_files(bench, f"{name}-pulled")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The head trained from and into an honest directory."""
    folder = tmp_path_factory.mktemp("honest")
    with one_thread():
        train(*write_pair(folder), out=folder / "run", options=TRAINING)
    return (folder / "run" / RunFile.HEAD).read_bytes()


def test_caches_are_written_and_trained_on_into_the_same_disk(
    disks: tuple[LyingDisk, LyingDisk], request: pytest.FixtureRequest, head: bytes
) -> None:
    here, there = (disk.path / request.node.name for disk in disks)
    here.mkdir()
    write_pair(here)
    with one_thread():
        train(*(FeatureCache(there / name) for name in ("train", "val")), out=there / "run", options=TRAINING)
    assert (there / "run" / RunFile.HEAD).read_bytes() == head


def test_schedules_of_faults_kills_and_jobs(bench: Bench) -> None:
    for seed in [ONLY] if ONLY is not None else range(IN_THE_SUITE):
        run_seed(bench, seed)


@pytest.mark.soak
def test_many_schedules_of_faults_kills_and_jobs(bench: Bench) -> None:
    for seed in range(IN_THE_SUITE, ALL):
        run_seed(bench, seed)
