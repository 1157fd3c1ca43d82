"""Processes of a computer share memory without a file, and know who can share with whom."""

import multiprocessing
import os
from dataclasses import dataclass

import numpy as np
import pytest

from evl_cache.processes import Processes, ProcessPlace, shared_memory, sharing_groups, sharing_processors

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="this system has no memory without a name"
)
FORK = multiprocessing.get_context("fork")


class Piped(Processes):
    """Processes that tell each other what they gather through a server of pipes. `pipe`: to it."""

    def gather(self, value, when):
        pipe = PIPES[self.place.rank]
        pipe.send(value)
        return pipe.recv()


PIPES: dict = {}


def together(world, function):
    """What `function` returns in each of some processes, by rank; it is called with one's `Processes`."""
    ends = [FORK.Pipe() for _ in range(world)]

    def run(rank):
        PIPES[rank] = ends[rank][1]
        try:
            result = function(Piped(place=ProcessPlace(rank=rank, world=world, local_world=world)))
        except BaseException as error:
            result = error
        ends[rank][1].send(_Ended(result))

    children = [FORK.Process(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for child in children:
        child.start()
    try:
        while True:
            values = [end.recv() for end, _ in ends]
            if any(isinstance(value, _Ended) for value in values):
                return [value.result for value in values]
            for end, _ in ends:
                end.send(values)
    finally:
        for child in children:
            child.kill()
            child.join()


@dataclass
class _Ended:
    result: object


def test_what_one_process_writes_the_others_read():
    def write_and_read(processes):
        groups = sharing_groups(processes)
        memory = shared_memory(processes, groups, 1000)
        assert memory is not None
        memory[100 * processes.place.rank] = 7 + processes.place.rank
        processes.gather(None, "")
        return groups, np.flatnonzero(memory).tolist(), memory[memory > 0].tolist(), len(memory)

    assert together(3, write_and_read) == [((0, 0, 0), [0, 100, 200], [7, 8, 9], 1000)] * 3


def test_groups_do_not_see_each_others_memory():
    def write_and_read(processes):
        memory = shared_memory(processes, (0, 1, 1), 10)
        memory[processes.place.rank] = 1
        processes.gather(None, "")
        return np.flatnonzero(memory).tolist()

    assert together(3, write_and_read) == [[0], [1, 2], [1, 2]]


def test_where_one_process_cannot_all_do_without(monkeypatch):
    def raising(*args):
        raise OSError("no memory")

    def ask(processes):
        if processes.place.rank == 1:
            monkeypatch.setattr("evl_cache.processes.sharing.mmap.mmap", raising)
        return shared_memory(processes, (0, 0), 10)

    assert together(2, ask) == [None, None]


def test_no_file_is_left_open():
    def count(processes):
        before = len(os.listdir("/proc/self/fd"))
        memory = shared_memory(processes, (0, 0), 10)
        return len(os.listdir("/proc/self/fd")) - before - (memory is not None)

    # A mapping keeps a descriptor of its own.
    assert together(2, count) == [0, 0]


def test_processes_on_other_processors_do_not_share_them():
    processors = sorted(os.sched_getaffinity(0))

    def count(processes):
        shared = sharing_processors(processes)
        if len(processors) > 1:
            os.sched_setaffinity(0, {processors[processes.place.rank % 2]})
        return shared, sharing_processors(processes)

    assert together(4, count) == [(4, 2 if len(processors) > 1 else 4)] * 4
    assert sharing_processors(Processes()) == 1
