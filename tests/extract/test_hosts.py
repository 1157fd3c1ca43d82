"""Extraction over several hosts, each in name spaces of its own, one of which is killed, late, or cut off for a while.

The disk is the one of this machine: what a network file system adds is not tested here.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from evl_cache.store import verify_cache
from evl_cache.store.disk.locks import lock_holders
from tests.support.extraction_server import Server, reached
from tests.support.network_hosts import Host, NoHosts, made_hosts
from tests.support.store_helpers import differences, tree, wait_until

SPEC = {"block_clips": 1}  # 8 blocks
PORT = "29511"  # of a network where nobody else is
EXPIRY_S = 60.0  # a busy machine may keep a host from moving its lock for seconds


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with ExitStack() as made:
        try:
            found = made.enter_context(made_hosts(3))
        except NoHosts as reason:
            pytest.skip(str(reason))
        yield found


@pytest.fixture(scope="module")
def servers(
    hosts: list[Host], motions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    with ThreadPoolExecutor(len(hosts)) as starts:
        started = list(starts.map(lambda host: Server(motions, host), hosts))
        yield started
        list(starts.map(Server.close, started))


@pytest.fixture(scope="module")
def alone(store_server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a single job's cache."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    store_server.run(cache, spec=SPEC)
    return tree(cache)


def start(servers: list[Server], cache: Path, rank: int, *, expiry_s: float = EXPIRY_S, **job: Any) -> int:
    """A rank of three, on the host of its number; the first keeps the rendezvous store."""
    environment = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": PORT}
    options = {"lock_expiry_s": expiry_s}
    job = {"patience_s": 0.2, **job}
    return servers[rank].start(cache, spec=SPEC, environment=environment, options=options, **job)


def check_whole(cache: Path, alone: dict[str, bytes]) -> None:
    assert differences(tree(cache), alone) == []
    assert verify_cache(cache).problems == ()


def done_blocks(cache: Path) -> int:
    return len(list(cache.glob("done/*.json")))


def held_by(cache: Path, host: Host) -> set[int]:
    return {block for block, name in lock_holders(cache / "locks").items() if name == host.name}


def test_hosts_share_the_blocks(
    servers: list[Server], hosts: list[Host], alone: dict[str, bytes], tmp_path: Path
) -> None:
    cache, gate = tmp_path / "cache", tmp_path / "go on"
    pids = [start(servers, cache, rank, gates={1: str(gate)}) for rank in range(3)]
    wait_until(lambda: all(held_by(cache, host) for host in hosts), what="each has a block in hand")
    gate.touch()
    reports = [servers[rank].wait(pid).report for rank, pid in enumerate(pids)]
    assert sum(report["here"] for report in reports) == 8 and min(report["here"] for report in reports) >= 1
    assert [report["rendezvous_lost"] for report in reports[:1]] == [[]]
    check_whole(cache, alone)


def test_the_blocks_of_a_host_that_is_gone_are_done_by_the_others(
    servers: list[Server], hosts: list[Host], alone: dict[str, bytes], tmp_path: Path
) -> None:
    killed, cache, gate = 0, tmp_path / "cache", tmp_path / "go on"  # the one that keeps the store
    pids = [start(servers, cache, rank, expiry_s=2.0, gates={1: str(gate)}) for rank in range(3)]
    wait_until(lambda: bool(held_by(cache, hosts[killed])), what="it has a block in hand")
    servers[killed].signal(pids[killed], 9)
    gate.touch()
    ended = [servers[rank].wait(pid) for rank, pid in enumerate(pids)]
    assert [end.code for end in ended] == [-9 if rank == killed else 0 for rank in range(3)]
    assert sum(end.report.get("here", 0) for end in ended) == 8
    check_whole(cache, alone)


def test_a_host_that_comes_late_takes_its_share(
    servers: list[Server], alone: dict[str, bytes], tmp_path: Path
) -> None:
    cache, gate = tmp_path / "cache", tmp_path / "go on"
    first = start(servers, cache, 0, gates={2: str(gate)})
    wait_until(reached(gate).exists, what="it has two blocks in hand, the first of which may be done")
    late = start(servers, cache, 1)
    wait_until(lambda: done_blocks(cache) >= 3, what="the late one has done two")
    gate.touch()
    found = servers[1].wait(late).report["here"], servers[0].wait(first).report["here"]
    assert found[0] >= 2 and found[1] >= 1 and sum(found) == 8
    check_whole(cache, alone)


@pytest.mark.parametrize("cut", [0, 1], ids=["that keeps the store", "another"])
def test_a_host_that_is_cut_off_works_on_and_is_back_when_the_network_is(
    servers: list[Server], hosts: list[Host], alone: dict[str, bytes], tmp_path: Path, cut: int
) -> None:
    cache, end = tmp_path / "cache", tmp_path / "go on"
    alone_again, third = tmp_path / "go on alone", tmp_path / "its third clip"
    gates = [{1: str(end)}, {1: str(end)}]
    # It has begun two blocks by then: the third clip is of another.
    gates[cut] = {1: str(alone_again), 3: str(third)}
    pids = [start(servers, cache, rank, gates=gates[rank]) for rank in range(2)]
    wait_until(lambda: all(held_by(cache, host) for host in hosts[:2]), what="each has a block in hand")
    before = held_by(cache, hosts[cut])
    hosts[cut].cut_off()
    alone_again.touch()
    try:
        wait_until(
            lambda: bool(held_by(cache, hosts[cut]) - before) and reached(third).exists(),
            what="it takes another one by the disk's locks",
        )
    finally:
        hosts[cut].bring_back()
        third.touch()
        end.touch()
    reports = [servers[rank].wait(pid).report for rank, pid in enumerate(pids)]
    assert sum(report["here"] for report in reports) == 8 and reports[cut]["here"] >= 3
    assert reports[cut]["rendezvous_lost"] == []
    check_whole(cache, alone)
