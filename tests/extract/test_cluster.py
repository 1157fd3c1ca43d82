"""Extraction by several processes that reach each other: numbers from the rendezvous, losses, late comers, hosts."""

import json
import os
import queue
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from evl_cache.caches.watch import watch
from evl_cache.errors import UsageError
from evl_cache.extract import ExtractOptions
from evl_cache.extract.stage import extract_blocks
from evl_cache.processes.place import ProcessPlace
from evl_cache.processes.rendezvous import Rendezvous
from evl_cache.store import verify_cache
from evl_cache_cli.main import cli
from tests.support.extraction_server import Server, reached
from tests.support.servers import free_port
from tests.support.store_helpers import (
    differences,
    extract_small,
    load_clips,
    small_job,
    small_spec,
    small_tower,
    tree,
    wait_until,
)

SPEC = {"block_clips": 1}  # 8 blocks


@pytest.fixture(scope="module")
def alone(store_server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a single job's cache."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    store_server.run(cache, spec=SPEC)
    return tree(cache)


def place(rank: int, world: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    """The environment of a rank, as srun or a shell sets it; the first process keeps the store."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def done_blocks(cache: Path) -> int:
    return len(list(cache.glob("done/*.json")))


def gates_of(ranks: int, folder: Path) -> list[Path]:
    return [folder / f"rank {rank} goes on" for rank in range(ranks)]


def check_whole(cache: Path, alone: dict[str, bytes]) -> None:
    assert differences(tree(cache), alone) == []
    assert verify_cache(cache).problems == ()


def test_ranks_share_the_blocks_by_numbers(
    store_server: Server, alone: dict[str, bytes], tmp_path: Path
) -> None:
    cache, port, gates = tmp_path / "cache", free_port(), gates_of(2, tmp_path)
    pids = [
        store_server.start(cache, spec=SPEC, gates={1: str(gate)}, environment=place(rank, 2, port))
        for rank, gate in enumerate(gates)
    ]
    wait_until(lambda: all(reached(gate).exists() for gate in gates), what="each has a block in hand")
    for gate in gates:
        gate.touch()
    reports = [store_server.wait(pid).report for pid in pids]
    assert sum(report["here"] for report in reports) == 8
    assert min(report["here"] for report in reports) >= 1
    assert reports[0]["rendezvous_lost"] == []
    check_whole(cache, alone)


@pytest.mark.parametrize("killed", [0, 2], ids=["that keeps the store", "another"])
def test_one_of_four_ranks_is_killed_and_the_others_finish_its_blocks(
    store_server: Server, alone: dict[str, bytes], tmp_path: Path, killed: int
) -> None:
    cache, port, gates = tmp_path / "cache", free_port(), gates_of(4, tmp_path)
    pids = [
        store_server.start(cache, spec=SPEC, gates={1: str(gate)}, environment=place(rank, 4, port))
        for rank, gate in enumerate(gates)
    ]
    wait_until(lambda: reached(gates[killed]).exists(), what="it has a block in hand")
    os.kill(pids[killed], signal.SIGKILL)
    for gate in gates:
        gate.touch()
    ended = [store_server.wait(pid) for pid in pids]
    assert [end.code for rank, end in enumerate(ended) if rank != killed] == [0, 0, 0]
    assert ended[killed].code == -signal.SIGKILL
    assert sum(end.report.get("here", 0) for end in ended) == 8
    check_whole(cache, alone)


@pytest.mark.parametrize("knows_the_store", [True, False])
def test_a_late_rank_takes_its_share(
    store_server: Server, alone: dict[str, bytes], tmp_path: Path, knows_the_store: bool
) -> None:
    cache, port, gate = tmp_path / "cache", free_port(), tmp_path / "go on"
    first = store_server.start(cache, spec=SPEC, gates={2: str(gate)}, environment=place(0, 2, port))
    wait_until(reached(gate).exists, what="it has blocks in hand")
    environment = place(7, 8, port) if knows_the_store else {}
    second = store_server.start(cache, spec=SPEC, environment=environment)
    wait_until(lambda: done_blocks(cache) >= 3, what="the late one has done two")
    gate.touch()
    late, early = (store_server.wait(pid).report for pid in (second, first))
    assert late["here"] >= 2 and early["here"] >= 1 and late["here"] + early["here"] == 8
    check_whole(cache, alone)


# Numbers


class SlowStore:
    """A store whose answers come when the test lets them."""

    def __init__(self) -> None:
        self.count, self.gate = 0, queue.SimpleQueue[Exception | None]()

    def add(self, key: str, amount: int, /) -> int:
        if (error := self.gate.get()) is not None:
            raise error
        self.count += amount
        return self.count


def test_an_answer_that_is_late_is_not_waited_for_twice_and_not_lost() -> None:
    store, lost = SlowStore(), list[str]()
    numbers = Rendezvous(lambda: store, place=ProcessPlace(), on_lost=lost.append, patience_s=0.1)
    assert numbers.next("a") is None  # cut off
    numbers._patience_s = 600.0
    assert numbers.next("a") is None  # at once
    store.gate.put(None)  # back
    wait_until(lambda: store.count == 1, what="the store answers")
    wait_until(lambda: numbers.next("a") == 0, what="the late answer")
    store.gate.put(None)
    assert numbers.next("a") == 1
    store.gate.put(RuntimeError("Connection reset by peer\nstack"))
    assert numbers.next("a") is None and lost == []  # it may have ended, as all is done
    assert numbers.next("a") is None and numbers.next("a") is None  # but something is left
    assert lost == ["Connection reset by peer"]


def test_a_store_that_cannot_be_opened_is_told_once() -> None:
    def connect() -> SlowStore:
        raise RuntimeError("no route to host")

    lost: list[str] = []
    numbers = Rendezvous(connect, place=ProcessPlace(), on_lost=lost.append)
    assert [numbers.next("a"), numbers.next("a")] == [None, None]
    assert lost == ["no route to host"]


def test_who_finds_all_done_asks_for_no_number(
    motions: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    for name, content in alone.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)
    store, lost = SlowStore(), list[str]()
    store.gate.put(RuntimeError("ended"))
    job = small_job(clips, cache, spec=replace(small_spec(clips, small_tower(motions)), **SPEC))
    extract_blocks(
        job,
        range(job.spec.num_blocks),
        redo={},
        options=ExtractOptions(batch=4, decode_workers=1),
        on_clip=lambda failed: None,
        rendezvous=Rendezvous(lambda: store, place=ProcessPlace(), on_lost=lost.append),
    )
    assert not store.gate.empty() and lost == []


def test_two_processes_get_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    found: list[int | None] = []

    def take(rank: int) -> None:
        numbers = Rendezvous.of_environment(ProcessPlace(rank=rank, world=2), patience_s=100.0)
        assert numbers is not None
        found.extend(numbers.next("cache") for _ in range(50))

    threads = [threading.Thread(target=take, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number in found if number is not None) == list(range(100))


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="start several processes with torchrun"):
        ProcessPlace.of_environment()


def test_a_process_has_its_own_gpu_of_its_computer_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    place = ProcessPlace.of_environment()
    assert (place.rank, place.world, place.local_world, place.is_first) == (5, 8, 4, False)
    assert [place.device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert ProcessPlace().device("cuda") == "cuda"


# How far it is, from anywhere


def test_watching_counts_marks_and_names_who_is_at_work(
    store_server: Server, motions: Path, tmp_path: Path
) -> None:
    cache, gate = tmp_path / "cache", tmp_path / "go on"
    pid = store_server.start(cache, spec=SPEC, gates={2: str(gate)})
    wait_until(reached(gate).exists, what="it has blocks in hand")
    looks = []
    for look in watch(cache, every_s=0.1):
        looks.append(look)
        gate.touch()
    store_server.wait(pid)
    assert looks[0].blocks == 8 and looks[0].blocks_done < 8
    assert any(look.in_hand.get(socket.gethostname()) for look in looks)
    assert [look.blocks_done for look in looks] == sorted(look.blocks_done for look in looks)
    assert (looks[-1].clips_done, looks[-1].clips_failed, looks[-1].seconds_left) == (7, 1, 0)
    told = CliRunner().invoke(cli, ["info", str(cache), "--watch"])
    assert told.output.startswith("8 of 8 clips, 1 failed; blocks 8 of 8")
    told = CliRunner().invoke(cli, ["info", str(cache), "--watch", "--json"])
    assert json.loads(told.stdout)["blocks_done"] == 8


def test_a_progress_line_counts_what_others_finish(
    store_server: Server, motions: Path, tmp_path: Path
) -> None:
    cache, clips, gate = tmp_path / "cache", load_clips(motions), tmp_path / "go on"
    pid = store_server.start(cache, spec=SPEC, gates={1: str(gate)})
    wait_until(reached(gate).exists, what="the other job has a block in hand")
    told: list[bool] = []

    def tell(failed: bool) -> None:
        told.append(failed)
        gate.touch()

    spec = replace(small_spec(clips, small_tower(motions)), **SPEC)
    here = extract_small(clips, cache, spec=spec, on_clip=tell).clips_done_here
    there = store_server.wait(pid).report["here"]
    assert here + there == 8 and there > 0
    assert (len(told), sum(told)) == (8, 1)
