"""A batch that is held while its memory is given to another one says so, and a clone of it stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evl_cache import FeatureCache
from evl_cache.batches import Batch, BatchMemory, BatchOverwritten, FeatureLoader
from evl_cache.errors import EvlCacheError
from evl_cache.store import StoredBatch
from tests.support.fake_streams import FakeStreams
from tests.support.feature_caches import write_cache

LAYERS = (3, 4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return write_cache(tmp_path_factory.mktemp("held") / "cache", labels=[i % 3 for i in range(26)])


@pytest.fixture(params=["cpu", "device"])
def loader(cache: FeatureCache, request: pytest.FixtureRequest) -> FeatureLoader:
    """Nine batches, used where they were read, or copied to a device."""
    streams = FakeStreams(host_computes=True)
    memory = BatchMemory("cpu:0", streams=streams) if request.param == "device" else None
    return FeatureLoader(cache, slice(None), layers=LAYERS, batch=3, shuffle_seed=1, memory=memory)


def are_right(cache: FeatureCache, batch: Batch) -> bool:
    found, expected = batch.features.dequantized(), cache.read(batch.samples, layers=LAYERS)
    assert found[1] is not None and expected[1] is not None
    pairs = zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def is_over(thing: Any, name: str) -> bool:
    try:
        getattr(thing, name)
    except BatchOverwritten:
        return True
    return False


def test_each_batch_of_a_list_is_right_or_says_that_it_was_overwritten(
    cache: FeatureCache, loader: FeatureLoader
) -> None:
    batches = list(loader.epoch())
    over = [is_over(batch, "features") for batch in batches]
    assert over == [True] * (9 - sum(not o for o in over)) + [False] * sum(not o for o in over)
    assert sum(over) >= 6
    assert all(are_right(cache, batch) for batch, o in zip(batches, over, strict=True) if not o)
    assert sorted(row for batch in batches for row in batch.samples) == list(range(26))
    assert "number=0" in repr(batches[0]), "a list of them can be printed"


def test_features_that_are_held_without_their_batch_say_so_too(
    cache: FeatureCache, loader: FeatureLoader
) -> None:
    first, *_ = [batch.features for batch in loader.epoch()]
    for name in ("tokens", "maps", "class_tokens"):
        assert is_over(first, name)
    for use in (first.dequantized, first.tensors, lambda: first.to("cpu"), lambda: first.part(0, 1)):
        with pytest.raises(BatchOverwritten):
            use()


@pytest.mark.parametrize(
    "kept", [lambda f: f.to("cpu"), lambda f: f.part(0, 2), lambda f: f.part(0, 2).to("cpu")]
)
def test_parts_of_a_batch_are_held_as_it_is(
    cache: FeatureCache, kept: Callable[[StoredBatch], StoredBatch]
) -> None:
    found = [
        kept(batch.features) for batch in FeatureLoader(cache, range(26), batch=3, layers=LAYERS).epoch()
    ]
    with pytest.raises(BatchOverwritten):
        found[0].tensors()
    assert found[-1].tensors()
    copies = [
        kept(batch.clone().features)
        for batch in FeatureLoader(cache, range(26), batch=3, layers=LAYERS).epoch()
    ]
    assert all(copy.tensors() for copy in copies)


def test_labels_are_right_or_say_so(cache: FeatureCache, loader: FeatureLoader) -> None:
    for batch in list(loader.epoch()):
        assert is_over(batch, "labels") or batch.labels.tolist() == cache.labels[batch.samples].tolist()


def test_clones_stay_as_they_are(cache: FeatureCache, loader: FeatureLoader) -> None:
    batches = [batch.clone() for batch in loader.epoch()]
    list(loader.epoch(1))
    assert all(are_right(cache, batch) for batch in batches)
    assert all(batch.labels.tolist() == cache.labels[batch.samples].tolist() for batch in batches)
    assert [batch.slot for batch in batches] == [None] * 9 and [b.number for b in batches] == list(range(9))


def test_a_batch_that_was_overwritten_cannot_be_cloned_or_copied_any_more(loader: FeatureLoader) -> None:
    first, *_ = list(loader.epoch())
    with pytest.raises(EvlCacheError, match=r"^this batch's memory holds another .* keep batch\.clone\(\)$"):
        first.clone()
    assert is_over(copy.copy(first), "features") and is_over(copy.deepcopy(first), "features")


def test_a_batch_holds_until_the_next_one_is_asked_for(cache: FeatureCache, loader: FeatureLoader) -> None:
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            assert are_right(cache, batch) and are_right(cache, batch.clone())


def test_another_loader_of_the_same_memory_overwrites_too(cache: FeatureCache, loader: FeatureLoader) -> None:
    *_, last = loader.epoch()
    assert not is_over(last, "features")
    other = FeatureLoader(cache, [0, 1, 2], layers=LAYERS, batch=3, memory=loader.memory)
    for _ in range(4):
        list(other.epoch())
    assert is_over(last, "features")


def test_nothing_is_copied(cache: FeatureCache) -> None:
    loader = FeatureLoader(cache, slice(None), layers=LAYERS, batch=3)
    addresses = {
        t.data_ptr() for n in range(2) for batch in loader.epoch(n) for t in batch.features.tensors()
    }
    one = next(loader.epoch())
    assert len(addresses) == 3 * len(one.features.tensors())  # the ring's, again and again
