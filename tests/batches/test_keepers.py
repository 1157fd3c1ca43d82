"""Which process takes which sample of a batch, where processes keep different ones."""

import numpy as np
import pytest

from evl_cache.batches.epoch_order import EpochOrder, Keepers, dealt_to_keepers, shared_out

SAMPLES = np.arange(0, 400, 2)


def orders(world, keepers, *, batch=16, shuffle_blocks=0, seed=4):
    return [
        EpochOrder(
            samples=SAMPLES,
            batch=batch,
            seed=seed,
            block_samples=10,
            shuffle_blocks=shuffle_blocks,
            rank=rank,
            world=world,
            keepers=keepers,
        )
        for rank in range(world)
    ]


def keepers_of(groups, capacities):
    names = sorted(set(groups))
    of_row = np.full(400, -1, dtype=np.int64)
    of_row[SAMPLES] = shared_out(SAMPLES, capacities, sizes=[groups.count(name) for name in names])
    return Keepers(of_row=of_row, group_of_rank=tuple(names.index(group) for group in groups))


@pytest.mark.parametrize("shuffle_blocks", [0, 3])
@pytest.mark.parametrize(
    ("groups", "capacities"),
    [((0, 1), (100, 100)), ((0, 1, 2), (10, 50, 0)), ((0, 0, 2, 2), (100, 100)), ((0, 1, 1), (60, 200))],
)
def test_a_batch_has_the_same_samples_and_parts_of_the_same_sizes(groups, capacities, shuffle_blocks):
    keepers, world = keepers_of(groups, capacities), len(groups)
    plain, dealt = (orders(world, k, shuffle_blocks=shuffle_blocks) for k in (None, keepers))
    for epoch in range(3):
        for before, after in zip(
            zip(*(o.parts(epoch) for o in plain), strict=True),
            zip(*(o.parts(epoch) for o in dealt), strict=True),
            strict=True,
        ):
            assert [len(p.rows) for p in before] == [len(p.rows) for p in after]
            assert [(p.number, p.total, p.is_stand_in) for p in before] == [
                (p.number, p.total, p.is_stand_in) for p in after
            ]
            both = [
                np.sort(np.concatenate([p.rows for p in side if not p.is_stand_in]))
                for side in (before, after)
            ]
            assert np.array_equal(*both)


def share_of_own(keepers, world, **more):
    """The share of samples that the process which takes them keeps."""
    own = total = 0
    for epoch in range(3):
        for order in orders(world, keepers, **more):
            for part in order.parts(epoch):
                own += int(np.count_nonzero(keepers.of_row[part.rows] == keepers.group_of_rank[order.rank]))
                total += len(part.rows)
    return own / total


def test_processes_mostly_take_what_they_keep():
    together = share_of_own(keepers_of((0, 1), (100, 100)), 2, batch=50)
    assert together > 0.88  # where parts were cut without a look: a half
    eight = share_of_own(keepers_of(tuple(range(8)), (25,) * 8), 8, batch=200)
    assert eight == 1.0  # each takes all that it keeps of a batch that is the whole epoch


def test_in_their_stored_order_processes_take_what_they_keep_and_nothing_else():
    assert share_of_own(keepers_of((0, 1), (100, 100)), 2, seed=None) == 1.0


def test_a_dealt_batch_by_hand():
    keepers = Keepers(of_row=np.asarray([0, 0, 0, 1, -1, 1]), group_of_rank=(0, 1))
    assert dealt_to_keepers(np.asarray([0, 1, 2, 3]), keepers).tolist() == [0, 1, 2, 3]
    assert dealt_to_keepers(np.asarray([5, 0, 3, 1]), keepers).tolist() == [0, 1, 5, 3]
    assert dealt_to_keepers(np.asarray([4, 3, 5, 2]), keepers).tolist() == [4, 2, 3, 5]
    assert dealt_to_keepers(np.asarray([2, 4, 1, 0]), keepers).tolist() == [2, 1, 4, 0]


def test_samples_are_dealt_out_in_turn_until_a_group_is_full():
    assert shared_out(np.arange(7), [3, 3], sizes=[1, 1]).tolist() == [0, 1, 0, 1, 0, 1, -1]
    assert shared_out(np.arange(5), [1, 9], sizes=[1, 1]).tolist() == [0, 1, 1, 1, 1]
    assert shared_out(np.arange(6), [2, 4], sizes=[1, 2]).tolist() == [1, 0, 1, 1, 0, 1]
