"""Processes of a computer share memory without a file, and know who can share with whom."""

import os

import numpy as np
import pytest

from evl_cache.processes import Processes, shared_memory, sharing_groups, sharing_processors
from tests.support.forked_ranks import together

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="this system has no memory without a name"
)


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
