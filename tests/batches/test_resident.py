"""Samples kept in memory: later epochs read nothing, and what is kept is what the cache holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evl_cache.batches.batch_memory import BatchMemory
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.batches.resident import ResidentSamples
from evl_cache.errors import UsageError
from evl_cache.store import FeatureCache, Reads
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_cache

LAYERS = (3, 4)
READS = Reads(layers=LAYERS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("resident") / "cache", failed=(2,)).path


@pytest.fixture
def cache(written):
    return FeatureCache(written)


@pytest.fixture
def reads(cache, monkeypatch):
    """Rows read from the cache's files so far."""
    rows: list[int] = []
    real = cache.read_into

    def read_into(buffers, samples, layers=None):
        pairs = list(samples)
        rows.extend(row for _, row in pairs)
        real(buffers, pairs, layers)

    monkeypatch.setattr(cache, "read_into", read_into)
    return rows


def resident_loader(cache, samples_kept, *, device="cpu", batch=4, world=1):
    valid = np.flatnonzero(cache.is_valid)
    one = cache.buffers(slots=1, reads=READS).nbytes
    resident = ResidentSamples(
        cache,
        valid,
        reads=READS,
        budget_bytes=samples_kept * one + one // 2,
        device=torch.device(device),
    )
    loader = FeatureLoader(cache, range(13), layers=LAYERS, batch=batch, shuffle_seed=3, resident=resident)
    return loader, resident


def check_epoch(loader, cache, number):
    """Every sample once, with the features that the cache holds. Returns: the order."""
    served = []
    for batch in loader.epoch(number):
        expected = cache.read(batch.samples.tolist(), layers=LAYERS)
        found = batch.features.to("cpu").dequantized()
        for side in (0, 1):
            assert all(torch.equal(f, e) for f, e in zip(found[side], expected[side], strict=True))
        served += batch.samples.tolist()
    assert sorted(served) == [row for row in range(13) if row != 2]
    return served


@pytest.mark.parametrize("device", DEVICES)
def test_after_one_epoch_no_file_is_read(written, cache, reads, device):
    loader, resident = resident_loader(cache, 100, device=device)
    assert resident.capacity == 12 and resident.nbytes == 12 * resident.sample_nbytes
    other = FeatureCache(written)  # what to compare with must not count
    first = check_epoch(loader, other, 0)
    assert sorted(reads) == sorted(first)
    reads.clear()
    assert check_epoch(loader, other, 1) != first and check_epoch(loader, other, 2) != first
    assert reads == []


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_read_every_time_and_is_always_the_same(written, cache, reads, device):
    loader, resident = resident_loader(cache, 5, device=device)
    assert resident.capacity == 5
    for number in range(3):
        reads.clear()
        check_epoch(loader, FeatureCache(written), number)
        # of 12 valid rows the first five are kept: 0, 1, 3, 4, 5
        assert sorted(reads) == ([0, 1, 3, 4, 5] if number == 0 else []) + [6, 7, 8, 9, 10, 11, 12]


def test_a_budget_below_one_sample_keeps_none(written, cache, reads):
    loader, resident = resident_loader(cache, 0)
    assert resident.capacity == 0
    for number in range(2):
        check_epoch(loader, FeatureCache(written), number)
    assert len(reads) == 24


def test_an_epoch_cut_short_keeps_what_was_read(written, cache, reads):
    loader, _ = resident_loader(cache, 100)
    next(iter(loader.epoch(0)))
    before = set(reads)
    reads.clear()
    check_epoch(loader, FeatureCache(written), 1)
    assert before and set(reads) == set(range(13)) - {2} - before


@pytest.mark.parametrize("device", DEVICES)
def test_assembled_on_the_device_or_in_the_ring_a_batch_is_the_same(cache, device):
    """The path for GPUs, on whatever device: rows kept and rows read in any mixture."""
    _, resident = resident_loader(cache, 6, device=device)
    memory = BatchMemory(pin_memory=device == "cuda")
    (host,) = memory.take_host(cache, READS, slots=4, count=1)
    out = cache.buffers(slots=4, reads=READS, device=torch.device(device))
    rng = np.random.default_rng(0)
    for _ in range(16):
        rows = rng.permutation(np.flatnonzero(cache.is_valid))[:4]
        is_kept = resident.holds(rows)
        cache.read_into(host.buffers, enumerate(rows[~is_kept].tolist()), LAYERS)
        resident.assemble(rows, is_kept, host, out)()
        found = out.batch(4).to("cpu").dequantized()
        expected = cache.read(rows.tolist(), layers=LAYERS)
        for side in (0, 1):
            assert all(torch.equal(f, e) for f, e in zip(found[side], expected[side], strict=True))
    assert resident.holds(np.asarray([0, 1, 3, 4, 5, 6])).all()
    assert not resident.holds(np.asarray([7, 8, 9])).any()


@pytest.mark.parametrize("keep", [{"keep_in": "ram"}, {"keep_in": "device", "keep_bytes": 30_000}])
def test_training_from_memory_gives_the_same_losses(written, tmp_path, keep):
    torch.set_num_threads(1)
    options = TrainOptions(head="decoder2", epochs=3, batch=4, lr=3e-3)

    def losses(out, options):
        found = []
        cache = FeatureCache(written)
        train(cache, cache, options=options, out=out, on_step=lambda done, total, loss: found.append(loss))
        return found

    assert losses(tmp_path / "plain", options) == losses(tmp_path / "kept", replace(options, **keep))


def test_a_place_or_an_amount_that_cannot_be_is_refused():
    for wrong in ({"keep_in": "tape"}, {"keep_bytes": 5}, {"keep_in": "ram", "keep_bytes": 0}):
        with pytest.raises(UsageError, match="keep_"):
            TrainOptions(epochs=1, **wrong)
