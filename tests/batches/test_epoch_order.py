"""Orders of an epoch take time and memory as there are samples, and are those that they were when they did not."""

import tracemalloc
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from evl_cache.batches.epoch_order import EpochOrder, shared_out


def slow_order(order: EpochOrder, epoch: int) -> np.ndarray:
    """The obvious way: all samples are looked at for each group of blocks."""
    assert order.seed is not None
    rng, samples = np.random.default_rng([order.seed, epoch]), order.samples
    if order.views > 1:
        cycle, number = divmod(epoch, order.views)
        draw = np.random.default_rng([order.seed, cycle, order.views])
        by_clip = samples.reshape(-1, order.views)
        view = draw.permuted(np.tile(np.arange(order.views), (len(by_clip), 1)), axis=1)[:, number]
        samples = by_clip[np.arange(len(by_clip)), view]
    if order.shuffle_blocks == 0:
        return rng.permutation(samples)
    block_of = samples // order.block_samples
    blocks = rng.permutation(np.unique(block_of))
    groups = [blocks[i : i + order.shuffle_blocks] for i in range(0, len(blocks), order.shuffle_blocks)]
    return np.concatenate([rng.permutation(samples[np.isin(block_of, group)]) for group in groups])


def slow_shares(samples: np.ndarray, capacities: Sequence[int], sizes: Sequence[int]) -> list[int]:
    turns = sorted(
        ((place + 0.5) / size, group)
        for group, (capacity, size) in enumerate(zip(capacities, sizes, strict=True))
        for place in range(capacity)
    )
    of_sample = [group for _, group in turns][: len(samples)]
    return of_sample + [-1] * (len(samples) - len(of_sample))


@pytest.mark.parametrize("count", [1, 5, 100, 3000])
def test_an_order_is_the_one_that_it_always_was(count: int) -> None:
    some = np.sort(np.random.default_rng(count).choice(3 * count, count, replace=False))
    cases = product(
        (some, np.random.default_rng(0).permutation(some)), (1, 7, 64), (0, 1, 3, 50), (1, 2, 5), (0, 4)
    )
    for samples, block_samples, shuffle_blocks, views, epoch in cases:
        if count % views == 0:
            order = EpochOrder(
                samples=samples,
                batch=8,
                seed=5,
                block_samples=block_samples,
                shuffle_blocks=shuffle_blocks,
                views=views,
            )
            found, expected = order.of(epoch), slow_order(order, epoch)
            assert found.dtype == expected.dtype == np.int64 and np.array_equal(found, expected)


def test_an_order_of_more_groups_than_16_bits_count_is_the_same() -> None:
    samples = np.arange(2, 70_002)
    order = EpochOrder(samples=samples, batch=8, seed=1, shuffle_blocks=1)  # a block a sample
    assert np.array_equal(order.of(2), np.random.default_rng([1, 2]).permutation(samples))


@pytest.mark.parametrize(
    ("views", "shuffle_blocks", "times"), [(1, 0, 1.1), (1, 16, 4.0), (10, 0, 0.5), (10, 16, 0.7)]
)
def test_an_order_takes_memory_as_a_few_times_its_samples(
    views: int, shuffle_blocks: int, times: float
) -> None:
    samples = np.arange(1_000_000)
    order = EpochOrder(
        samples=samples, batch=64, seed=0, views=views, shuffle_blocks=shuffle_blocks, block_samples=640
    )
    tracemalloc.start()
    parts = order.parts(0)
    rows = [next(parts).rows for _ in range(3)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < times * samples.nbytes
    assert all(part.base is not None for part in rows)  # of the one order


def test_samples_are_dealt_out_turn_by_turn() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        capacities, sizes = random.integers(0, 60, 4).tolist(), random.integers(1, 5, 4).tolist()
        samples = np.arange(int(random.integers(0, 150)))
        found = shared_out(samples, capacities, sizes=sizes)
        assert found.tolist() == slow_shares(samples, capacities, sizes) and found.dtype == np.int64
