"""The loaders of a training: who keeps which samples, and how many threads read."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import evl_cache.batches.reading_threads as reading_threads
import evl_cache.train.loaders as loaders
from evl_cache.batches import read_threads
from evl_cache.errors import UsageError
from evl_cache.processes import Processes
from evl_cache.store import FeatureCache, Reads
from evl_cache.train.loaders import make_loaders
from evl_cache.train.options import OPERATIONAL
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache, write_pair
from tests.support.forked_ranks import together

READS = Reads(layers=(3, 4))
OPTIONS = TrainOptions(epochs=3, batch=8, keep_in="ram")
needs_memfd = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="memory cannot be shared without a name"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    train = write_cache(folder / "train", labels=[i % 3 for i in range(40)])
    val = write_cache(folder / "val", labels=(0, 1, 2, 2), prefix="v", split="val", seed=1)
    return train.path, val.path


def epochs_of(paths, processes, *, kept_nbytes, options=OPTIONS):
    """Reads three epochs of training. Returns, by epoch: rows read from the disk, rows served, whether they are right."""
    caches = FeatureCache(paths[0]), FeatureCache(paths[1])
    read: list[int] = []
    real = caches[0].read_into

    def read_into(buffers, samples, layers=None):
        pairs = list(samples)
        read.extend(row for _, row in pairs)
        real(buffers, pairs, layers)

    caches[0].read_into = read_into
    samples = np.arange(len(caches[0])), np.arange(len(caches[1]))
    loader, _ = make_loaders(caches, samples, READS, options, processes, kept_nbytes=kept_nbytes)
    plain, found = FeatureCache(paths[0]), []
    for epoch in range(3):
        read.clear()
        served, right = [], True
        for batch in loader.epoch(epoch):
            expected = plain.read(batch.samples.tolist(), layers=READS.layers)
            have = batch.features.dequantized()
            right &= all(torch.equal(a, b) for s in (0, 1) for a, b in zip(have[s], expected[s], strict=True))
            served += batch.samples.tolist()
        processes.gather(None, "after an epoch, as validation does")
        found.append((sorted(read), sorted(served), right))
    return found


def half(paths):
    """Bytes of half of the training samples."""
    return 20 * FeatureCache(paths[0]).buffers(slots=1, reads=READS).nbytes


@needs_memfd
def test_with_room_for_half_of_the_samples_each_two_processes_read_nothing_after_the_first_epoch(paths):
    found = together(2, lambda processes: epochs_of(paths, processes, kept_nbytes=half(paths)))
    for epoch in range(3):
        (read, served, right), (others_read, others_served, theirs_right) = (rank[epoch] for rank in found)
        assert right and theirs_right and sorted(served + others_served) == list(range(40))
        assert sorted(read + others_read) == (list(range(40)) if epoch == 0 else [])


def test_processes_that_cannot_share_memory_keep_different_samples(paths, monkeypatch):
    monkeypatch.setattr(loaders, "shared_memory", lambda *args: None)
    found = together(2, lambda processes: epochs_of(paths, processes, kept_nbytes=half(paths)))
    for epoch in range(3):
        assert all(rank[epoch][2] for rank in found)
        assert sorted(found[0][epoch][1] + found[1][epoch][1]) == list(range(40))
        reads = sum(len(rank[epoch][0]) for rank in found)
        # Were the same rows kept by both, half of the samples would be read again.
        assert reads == 40 if epoch == 0 else reads <= 0.3 * 40


def test_what_does_not_fit_is_read_every_time(paths):
    found = together(2, lambda processes: epochs_of(paths, processes, kept_nbytes=half(paths) // 2))
    for epoch in range(3):
        assert all(rank[epoch][2] for rank in found)
        reads = sum(len(rank[epoch][0]) for rank in found)
        assert reads == (40 if epoch == 0 else 20)


@needs_memfd
def test_without_room_for_one_sample_none_is_kept(paths):
    found = together(2, lambda processes: epochs_of(paths, processes, kept_nbytes=10))
    for epoch in range(3):
        assert all(rank[epoch][2] for rank in found)
        assert sum(len(rank[epoch][0]) for rank in found) == 40


def test_one_process_keeps_as_before(paths):
    found = epochs_of(paths, Processes(), kept_nbytes=half(paths))
    assert [read for read, _, _ in found] == [list(range(40)), *[list(range(20, 40))] * 2]


def test_threads_follow_the_processors_beside_a_gpu_and_are_two_beside_a_cpu(monkeypatch):
    monkeypatch.setattr(reading_threads, "usable_cpus", lambda: 24)
    assert read_threads(None, "cpu") == 2 and read_threads(7, "cpu") == 7
    assert read_threads(None, "cuda") == 23 and read_threads(5, "cuda:1") == 5
    assert read_threads(None, "cuda", sharing=8) == 2
    monkeypatch.setattr(reading_threads, "usable_cpus", lambda: 128)
    assert read_threads(None, "cuda") == 32 and read_threads(None, "cuda", sharing=8) == 15
    monkeypatch.setattr(reading_threads, "usable_cpus", lambda: 1)
    assert read_threads(None, "cuda") == 2


def test_threads_read_as_many_as_the_options_say_and_change_nothing(tmp_path, paths):
    torch.set_num_threads(1)
    caches = write_pair(tmp_path)
    samples = np.arange(13), np.arange(5)
    for number in (1, 5):
        options = replace(OPTIONS, keep_in=None, read_threads=number)
        loader, _ = make_loaders(caches, samples, READS, options, Processes(), kept_nbytes=0)
        assert loader._threads == number

    def losses(out, **more):
        found = []
        options = TrainOptions(head="decoder1", epochs=2, batch=4, **more)
        train(*caches, options=options, out=out, on_step=lambda done, total, loss: found.append(loss))
        return found

    assert losses(tmp_path / "one", read_threads=1) == losses(tmp_path / "five", read_threads=5)


def test_the_number_of_threads_may_change_when_a_run_goes_on_and_is_at_least_one():
    assert "read_threads" in OPERATIONAL
    with pytest.raises(UsageError, match="read_threads is 0"):
        TrainOptions(epochs=1, read_threads=0)
