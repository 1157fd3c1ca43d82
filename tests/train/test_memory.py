"""What a training takes of memory stays below what there is: samples that are kept, what loaders hold, and its steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import evl_cache.train.batch_size as batch_size
import evl_cache.train.memory as memory
from evl_cache.batches import DEVICE_RING, DEVICE_SLOTS, KEPT_SHARE, RING
from evl_cache.errors import UsageError
from evl_cache.processes import MEMORY_SHARE, Processes, ProcessPlace
from evl_cache.store import FeatureCache, Reads
from evl_cache.train.batch_size import share_out_memory
from evl_cache.train.memory import GPU_SHARE, PINNED_ROUNDING, WEIGHED_SHARE, Loads, StepNeeds
from evl_cache.train.stage import TrainOptions
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(epochs=1, batch="auto")
MB = 10**6
SAMPLE = 7 * MB
FIXED, EACH = 300 * MB, 20 * MB  # of a step by itself, and for each sample of a pass
LOADS = Loads(sample_nbytes=SAMPLE, kinds=1, all_nbytes=5_000 * SAMPLE, num_samples=4_000, most_samples=4_000)
DEVICE = "cuda:0"


class AloneInAProcess(Processes):
    """One of several processes of a computer; the others say what this one says."""

    def gather(self, value, when):
        return [value] * self.place.world


def of_several(world, local_world=None):
    return AloneInAProcess(place=ProcessPlace(rank=0, world=world, local_world=local_world or world))


@pytest.fixture
def machine(monkeypatch):
    """A computer, with a GPU or without, whose free bytes a test says. Returns: what sets them."""
    free = {"cpu": 0, "cuda": 0}
    taken: list[int] = []

    def step_nbytes(build, features, options, *, sizes):
        assert 1 <= sizes[0] < sizes[1]
        return StepNeeds(fixed=FIXED, each=EACH)

    def training_step(head, features, options, *, batch):
        if sum(taken) + FIXED + batch * EACH > free["cuda"]:
            raise torch.OutOfMemoryError

    def reserve(nbytes, device):
        taken.append(nbytes)
        return torch.empty(0)

    real = batch_size.largest_that

    def largest_that(fits, *, cap):
        def fits_alone(batch):
            taken.clear()
            return fits(batch)

        return real(fits_alone, cap=cap)

    monkeypatch.setattr(batch_size, "step_nbytes", step_nbytes)
    monkeypatch.setattr(batch_size, "training_step", training_step)
    monkeypatch.setattr(batch_size, "reserve", reserve)
    monkeypatch.setattr(batch_size, "largest_that", largest_that)
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[device.type])
    return free


def shared_out(options, processes=None, loads=LOADS, on_note=lambda message: None):
    """Returns: samples of a pass in one process, and the bytes that it keeps."""
    processes = processes or Processes()
    found, kept = share_out_memory(
        options,
        build=lambda: None,
        probe=lambda: None,
        loads=loads,
        recorded=None,
        processes=processes,
        on_note=on_note,
    )
    shared = processes.place.world * options.accumulate
    assert found.batch % shared == 0
    return found.batch // shared, kept


@pytest.mark.parametrize("free", [2_000 * MB, 8_000 * MB, 20_000 * MB, 10**12])
@pytest.mark.parametrize("kept", [{}, {"keep_in": "ram"}, {"keep_in": "ram", "keep_bytes": 5_000 * MB}])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_on_a_cpu_all_parts_together_stay_below_what_is_free(machine, free, kept, accumulate, world):
    machine["cpu"] = free
    options = replace(OPTIONS, accumulate=accumulate, **kept)
    batch, resident = shared_out(options, of_several(world))
    loaded = RING * SAMPLE * batch * accumulate
    assert world * (resident + loaded + FIXED + EACH * batch) <= MEMORY_SHARE * free
    assert bool(resident) == bool(kept) or free == 2_000 * MB


@pytest.mark.parametrize("free", [4_000 * MB, 16_000 * MB, 80_000 * MB])
@pytest.mark.parametrize(
    "kept", [{}, {"keep_in": "ram"}, {"keep_in": "device"}, {"keep_in": "device", "keep_bytes": 60_000 * MB}]
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_on_a_gpu_all_parts_together_stay_below_what_is_free(machine, free, kept, accumulate):
    machine["cuda"], machine["cpu"] = free, 30_000 * MB
    options = replace(OPTIONS, device=DEVICE, accumulate=accumulate, **kept)
    batch, resident = shared_out(options)
    on_device, steps = (
        options.keep_in == "device",
        2 if accumulate == 1 else 1,
    )  # a recorded step holds its memory
    held = (DEVICE_SLOTS + on_device) * SAMPLE * batch * accumulate
    assert (resident if on_device else 0) + held + steps * (FIXED + EACH * batch) <= free
    pinned = DEVICE_RING * SAMPLE * batch * accumulate
    assert (0 if on_device else resident) + pinned <= MEMORY_SHARE * machine["cpu"]
    assert resident > 0 or not kept or free == 4_000 * MB


def test_memory_for_no_sample_at_all_is_told(machine):
    machine["cpu"] = 400 * MB
    with pytest.raises(UsageError, match="not even one sample"):
        shared_out(replace(OPTIONS, keep_in="ram"))


def test_page_locked_memory_bounds_the_batch_where_the_gpu_has_more(machine):
    machine["cuda"], machine["cpu"] = 10**12, 4_000 * MB
    batch, _ = shared_out(replace(OPTIONS, device=DEVICE))
    assert batch == int(MEMORY_SHARE * 4_000 * MB / (PINNED_ROUNDING * DEVICE_RING * SAMPLE))


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_samples_come_first_but_leave_what_a_batch_of_the_default_size_needs(machine, device):
    machine["cpu"] = machine["cuda"] = 20_000 * MB
    options = replace(OPTIONS, device=device, keep_in="ram" if device == "cpu" else "device")
    batch, kept = shared_out(options)
    steps, loaded = (1, RING) if device == "cpu" else (2, DEVICE_SLOTS + 1)
    needed = steps * (FIXED + 64 * EACH) + 64 * loaded * SAMPLE
    share = MEMORY_SHARE if device == "cpu" else GPU_SHARE
    assert kept == int(min(KEPT_SHARE * 20_000 * MB, share * 20_000 * MB - needed))
    assert batch >= 64


def test_a_few_samples_are_kept_whole_and_the_batch_gets_the_rest(machine):
    machine["cpu"] = 8_000 * MB
    few = replace(LOADS, all_nbytes=100 * SAMPLE)
    batch, kept = shared_out(replace(OPTIONS, keep_in="ram"), loads=few)
    assert kept == 100 * SAMPLE
    assert batch == int((MEMORY_SHARE * 8_000 * MB - kept - FIXED) / (EACH + RING * SAMPLE))


def test_a_batch_that_is_given_is_counted_too(machine):
    machine["cpu"] = 8_000 * MB
    options = replace(OPTIONS, batch=64, keep_in="ram")
    needed = 64 * RING * SAMPLE + FIXED + 64 * EACH
    assert shared_out(options) == (64, int(MEMORY_SHARE * 8_000 * MB - needed))
    assert shared_out(replace(options, keep_bytes=10 * MB)) == (64, 10 * MB)
    assert shared_out(replace(options, keep_in=None)) == (64, 0)


def test_few_samples_beside_a_batch_that_is_given_are_kept_without_measuring_a_step(machine, monkeypatch):
    machine["cpu"] = 8_000 * MB
    monkeypatch.setattr(batch_size, "step_nbytes", None)
    few = replace(LOADS, all_nbytes=int(0.9 * WEIGHED_SHARE * 8_000 * MB))
    assert shared_out(replace(OPTIONS, batch=64, keep_in="ram"), loads=few) == (64, few.all_nbytes)


def test_the_passes_of_a_batch_that_is_given_are_counted_as_the_data_fill_them(machine):
    machine["cpu"] = 8_000 * MB
    few = replace(LOADS, num_samples=100, most_samples=100)
    options = replace(
        OPTIONS, batch=1024, accumulate=4, keep_in="ram"
    )  # a pass of up to 256: all in the first
    needed = 100 * RING * SAMPLE + FIXED + 100 * EACH
    assert shared_out(options, loads=few)[1] == int(MEMORY_SHARE * 8_000 * MB - needed)


@pytest.mark.parametrize("batch", [256, "auto"])
def test_samples_for_which_nothing_is_left_are_told_of(machine, batch):
    machine["cpu"] = 2_000 * MB
    said = []
    options = replace(OPTIONS, batch=batch, keep_in="ram")
    assert shared_out(options, on_note=said.append)[1] == 0
    (line,) = said
    assert line.startswith("0.0 GB are kept: 2.0 GB are free")


def test_processes_of_a_computer_share_what_is_kept_in_its_memory(machine):
    machine["cpu"] = 10**12
    assert shared_out(replace(OPTIONS, batch=64, keep_in="ram"), of_several(4))[1] == LOADS.all_nbytes // 4
    told = replace(OPTIONS, batch=64, keep_in="ram", keep_bytes=400 * MB)
    assert shared_out(told, of_several(8, local_world=4))[1] == 100 * MB


def test_a_step_that_is_not_recorded_leaves_room_for_more(machine):
    machine["cuda"], machine["cpu"] = 30_000 * MB, 80_000 * MB
    recorded, _ = shared_out(replace(OPTIONS, device=DEVICE))
    plain, _ = shared_out(replace(OPTIONS, device=DEVICE, cuda_graph=False))
    assert 1.3 * recorded < plain


def test_a_gpu_too_small_for_the_measured_batches_is_measured_on_smaller_ones(machine, monkeypatch):
    machine["cuda"], machine["cpu"] = 1_000 * MB, 30_000 * MB
    tried = []

    def step_nbytes(build, features, options, *, sizes):
        tried.append(sizes)
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        return StepNeeds(fixed=FIXED, each=EACH)

    monkeypatch.setattr(batch_size, "step_nbytes", step_nbytes)
    batch, _ = shared_out(replace(OPTIONS, device=DEVICE, keep_in="device"))
    assert tried == [(4, 16), (1, 2)] and batch >= 1


def test_what_the_system_does_not_tell_leaves_the_default_batch(machine, monkeypatch):
    machine["cpu"] = 20_000 * MB
    monkeypatch.setattr(batch_size, "step_nbytes", lambda *args, **more: None)
    assert shared_out(OPTIONS) == (64, 0)


def test_what_is_loaded_is_what_both_caches_hold(tmp_path):
    caches = write_pair(tmp_path, failed=(2,))
    samples = np.arange(len(caches[0])), np.arange(3)
    reads = Reads(layers=(3, 4))
    one = FeatureCache(caches[0].path).buffers(slots=1, reads=reads).nbytes
    found = Loads.of(caches, samples, reads)
    assert found == Loads(
        sample_nbytes=one, kinds=1, all_nbytes=(12 + 2) * one, num_samples=12, most_samples=12
    )


def test_a_batch_larger_than_the_data_leaves_room_for_what_was_told_to_be_kept(machine):
    machine["cpu"] = 60_000 * MB
    few = replace(LOADS, all_nbytes=500 * SAMPLE, num_samples=400, most_samples=400)
    options = replace(OPTIONS, batch=2048, keep_in="ram", keep_bytes=20_000 * MB)
    assert shared_out(options, loads=few)[1] == few.all_nbytes


def test_what_was_told_to_be_kept_is_cut_with_a_word(machine):
    machine["cpu"] = 60_000 * MB
    options = replace(OPTIONS, batch=64, keep_in="ram", keep_bytes=50_000 * MB)
    said = []
    loads = replace(LOADS, all_nbytes=10_000 * SAMPLE)
    _, kept = shared_out(options, loads=loads, on_note=said.append)
    assert kept < 50_000 * MB
    (line,) = said
    assert line.startswith(f"{kept / 1e9:.1f} of 50.0 GB are kept: 60.0 GB are free")
