"""Batches are copied to a device while it computes, and no memory changes while a copy or a computation reads it."""

import numpy as np
import pytest
import torch

from evl_cache.batches.batch_memory import DEVICE_RING, DEVICE_SLOTS, BatchMemory
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.batches.resident import ResidentSamples
from evl_cache.errors import CacheDamaged
from evl_cache.store import FeatureCache, Reads
from tests.support.fake_streams import FakeStreams
from tests.support.feature_caches import write_cache

LAYERS = (3, 4)
READS = Reads(layers=LAYERS)
# Another device than the computer's memory, as far as the loader can tell.
DEVICE = torch.device("cpu:0")
SCHEDULES = [{"lazy": "copies"}, {"lazy": "computes"}, *({"seed": seed} for seed in range(4))]
KEPT = [None, 0, 5, 100]  # samples kept on the device


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_cache(
        tmp_path_factory.mktemp("feed") / "cache", labels=[i % 3 for i in range(26)], failed=(2,)
    )


@pytest.fixture
def cache(written):
    return FeatureCache(written.path)


def loader_of(cache, streams, *, batch=4, kept=None, **more):
    resident = None
    if kept is not None:
        valid = np.flatnonzero(cache.is_valid)
        budget = kept * cache.buffers(slots=1, reads=READS).nbytes
        resident = ResidentSamples(cache, valid, reads=READS, budget_bytes=budget, device=DEVICE)
    return FeatureLoader(
        cache,
        range(26),
        layers=LAYERS,
        batch=batch,
        shuffle_seed=3,
        memory=None if streams is None else BatchMemory(DEVICE, streams=streams),
        resident=resident,
        **more,
    )


def tensors_of(batch):
    """Every tensor that a batch has, by name."""
    found = {"labels": batch.labels}
    for layer, (tokens, maps) in enumerate(zip(batch.features.tokens, batch.features.maps, strict=True)):
        found |= {
            f"codes {layer}": tokens.codes,
            f"affine {layer}": tokens.affine,
            f"scale {layer}": tokens.scale,
        }
        found |= {f"maps {layer}": maps.codes, f"row max {layer}": maps.row_max}
    return found


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def what_the_device_sees(loader, streams, epochs=2):
    """The batches of some epochs as computations see them, which are done whenever the streams like."""
    seen, rows = [], []
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            rows.append(batch.samples.tolist())
            tensors = tensors_of(batch)
            streams.use(lambda tensors=tensors: seen.append(copied(tensors)))
            streams.run_some()
    streams.run_all()
    return seen, rows


def what_the_loader_gives(cache, epochs=2):
    loader = loader_of(cache, None)
    batches = [
        (copied(tensors_of(batch)), batch.samples.tolist())
        for n in range(epochs)
        for batch in loader.epoch(n)
    ]
    return [tensors for tensors, _ in batches], [rows for _, rows in batches]


def are_equal(found, expected):
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_device_sees_the_batches_of_the_loader_whenever_its_streams_do_their_work(cache, schedule, kept):
    streams = FakeStreams(**schedule)
    expected, order = what_the_loader_gives(cache)
    seen, rows = what_the_device_sees(loader_of(cache, streams, kept=kept), streams)
    assert rows == order and are_equal(seen, expected)


@pytest.mark.parametrize("missing", [{"copy_waits": False}, {"use_waits": False}, {"marks_lie": True}])
def test_without_any_one_of_the_waits_the_device_would_see_other_bytes(cache, missing):
    expected, _ = what_the_loader_gives(cache)

    def is_right(schedule):
        streams = FakeStreams(**schedule, **missing)
        return are_equal(what_the_device_sees(loader_of(cache, streams), streams)[0], expected)

    assert not all(is_right(schedule) for schedule in SCHEDULES)


def test_the_next_batch_is_on_its_way_while_one_is_used(cache):
    streams = FakeStreams()
    copies = []
    loader = loader_of(cache, streams)
    wait_for_threads(loader)
    for _ in loader.epoch():
        copies.append(streams.given["copies"])
        streams.run_all()
    # As batch k is handed out, its copy and that of the next were given to the device.
    assert copies == [min(k + 2, len(loader)) for k in range(len(loader))]


def wait_for_threads(loader):
    """Have every part be whole as soon as it is asked for, so that how far ahead copies are does not depend on luck."""
    real = loader._start

    def start(pool, part, slot):
        found = real(pool, part, slot)
        for future in found[1]:
            future.exception()
        return found

    loader._start = start


def test_a_slot_keeps_its_addresses_and_has_a_number(cache):
    streams = FakeStreams()
    loader, addresses = loader_of(cache, streams), {}
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            found = {name: tensor.data_ptr() for name, tensor in tensors_of(batch).items()}
            assert addresses.setdefault(batch.slot, found) == found
    assert sorted(addresses) == list(range(DEVICE_SLOTS))
    assert [batch.slot for batch in loader_of(cache, None).epoch()] == [None] * len(loader)


def test_loaders_of_one_memory_take_turns_in_it(cache):
    streams = FakeStreams()
    one = loader_of(cache, streams)
    other = FeatureLoader(cache, range(9), layers=LAYERS, batch=3, memory=one.memory)
    slots = {batch.slot for loader in (one, other, one) for batch in loader.epoch()}
    assert slots == set(range(DEVICE_SLOTS))
    assert len(one.memory._host) == DEVICE_RING


def test_a_smaller_memory_makes_room_for_a_larger_one(cache):
    streams = FakeStreams()
    small = FeatureLoader(
        cache, range(9), layers=LAYERS, batch=2, memory=BatchMemory(DEVICE, streams=streams)
    )
    large = FeatureLoader(cache, range(26), layers=LAYERS, batch=8, memory=small.memory)
    list(small.epoch())
    expected = [batch.samples.tolist() for batch in loader_of(cache, None, batch=8).epoch()]
    assert [len(batch.samples) for batch in large.epoch()] == [len(rows) for rows in expected]
    assert [slot.buffers.slots for slot in large.memory._host] == [8] * DEVICE_RING
    assert [slot.number for slot in large.memory._device] == [2, 3]


def test_two_iterators_at_once_have_their_own_memory(cache):
    streams = FakeStreams(lazy="copies")
    loader = loader_of(cache, streams)
    expected, _ = what_the_loader_gives(cache, epochs=1)
    seen = [], []
    for pair in zip(loader.epoch(), loader.epoch(), strict=True):
        assert pair[0].slot != pair[1].slot
        for found, batch in zip(seen, pair, strict=True):
            tensors = tensors_of(batch)
            streams.use(lambda tensors=tensors, found=found: found.append(copied(tensors)))
    streams.run_all()
    assert are_equal(seen[0], expected) and are_equal(seen[1], expected)


@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("how", ["break", "error", "close"])
def test_an_epoch_cut_short_leaves_no_copy_pending_and_the_next_one_is_whole(cache, schedule, kept, how):
    streams = FakeStreams(**schedule)
    loader = loader_of(cache, streams, kept=kept)
    seen = []
    epoch = loader.epoch(0)
    try:
        for number, batch in enumerate(epoch):
            tensors = tensors_of(batch)
            streams.use(lambda tensors=tensors: seen.append(copied(tensors)))
            if number == 2:
                if how == "error":
                    raise KeyError("the step fails")
                break
    except KeyError:
        pass
    epoch.close()
    assert streams.given["copies"] == streams.done["copies"]
    assert len(loader.memory._host) == DEVICE_RING and len(loader.memory._device) == DEVICE_SLOTS
    # What was computed with the last batch is not done yet, and must not see the next epoch's.
    again, _ = what_the_device_sees(loader, streams, epochs=1)
    expected, _ = what_the_loader_gives(cache, epochs=1)
    assert are_equal(seen, expected[:3]) and are_equal(again, expected)


def test_what_cannot_be_read_is_told_after_the_batches_before_it(cache, monkeypatch):
    streams = FakeStreams()
    loader = loader_of(cache, streams)
    wait_for_threads(loader)
    order = [batch.samples.tolist() for batch in loader.epoch()]
    real = cache.read_into

    def read_into(buffers, samples, layers=None):
        pairs = list(samples)
        if any(row in order[3] for _, row in pairs):
            raise CacheDamaged("a chunk is damaged")
        real(buffers, pairs, layers)

    monkeypatch.setattr(cache, "read_into", read_into)
    epoch = loader.epoch()
    assert [next(epoch).samples.tolist() for _ in range(3)] == order[:3]
    with pytest.raises(CacheDamaged, match="damaged"):
        next(epoch)


def test_samples_kept_on_the_device_are_not_read_again(cache, monkeypatch):
    streams = FakeStreams(lazy="copies")
    loader = loader_of(cache, streams, kept=100)
    what_the_device_sees(loader, streams, epochs=1)
    monkeypatch.setattr(cache, "read_into", None)
    seen, _ = what_the_device_sees(loader, streams, epochs=2)
    assert are_equal(seen, what_the_loader_gives(FeatureCache(cache.path))[0])


@pytest.mark.gpu
@pytest.mark.parametrize("kept", KEPT)
def test_a_gpu_that_is_busy_sees_the_batches_of_the_loader(cache, kept):
    expected, order = what_the_loader_gives(cache)
    memory = BatchMemory("cuda")
    resident = None
    if kept is not None:
        budget = kept * cache.buffers(slots=1, reads=READS).nbytes
        valid = np.flatnonzero(cache.is_valid)
        resident = ResidentSamples(cache, valid, reads=READS, budget_bytes=budget, device=memory.device)
    loader = FeatureLoader(
        cache, range(26), layers=LAYERS, batch=4, shuffle_seed=3, memory=memory, resident=resident
    )
    seen, rows, slots = [], [], set()
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            torch.cuda._sleep(20_000_000)  # the device lags behind the host
            seen.append(copied(tensors_of(batch)))
            rows.append(batch.samples.tolist())
            slots.add(batch.slot)
    found = [{name: tensor.cpu() for name, tensor in tensors.items()} for tensors in seen]
    assert rows == order and slots == {0, 1} and are_equal(found, expected)
