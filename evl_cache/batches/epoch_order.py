"""Which samples make which batch of an epoch, and which part of it is whose: one order for any number of processes.

B samples of a global batch, N samples in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from evl_cache.errors import UsageError

MOST_SEED = 2**64 - 1  # that torch takes


@dataclass(frozen=True, kw_only=True)
class BatchPart:
    """One process's part of a batch.

    Attributes:
        number: of the batch in its epoch.
        rows: int64, samples of this process, in order.
        total: samples of the batch in all processes.
        is_stand_in: the batch is too small to have a part for this process; `rows` is one sample, of no weight.
    """

    number: int
    rows: np.ndarray
    total: int
    is_stand_in: bool


@dataclass(frozen=True, kw_only=True)
class Keepers:
    """Which processes keep which samples in memory. Processes that share their memory are one group.

    Attributes:
        of_row: int64, the group that keeps each row of the cache; -1 for none.
        group_of_rank: the group of each process.
    """

    of_row: np.ndarray
    group_of_rank: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """Which samples each epoch has, in which order and in which batches.

    Attributes:
        samples: int64 (N,), rows of the cache.
        batch: B, of all processes together; the last batch of an epoch is smaller.
        seed: an epoch's order is drawn from (seed, epoch); None keeps the order.
        block_samples: rows of a block.
        shuffle_blocks: 0 permutes all samples. Otherwise blocks are permuted, and samples are shuffled within so many
            at a time.
        views: samples of a clip, one after another, of which an epoch has one; `views` epochs have each once.
        rank, world: this process, and how many there are.
        keepers: who keeps what: a process then gets the samples of a batch that it keeps, as far as its part goes. None:
            parts are cut out of the batch one after another.
    """

    samples: np.ndarray
    batch: int
    seed: int | None = None
    block_samples: int = 1
    shuffle_blocks: int = 0
    views: int = 1
    rank: int = 0
    world: int = 1
    keepers: Keepers | None = None

    def __post_init__(self) -> None:
        check_seed("shuffle_seed", self.seed)

    def __len__(self) -> int:
        """Batches of an epoch, the same for every process."""
        return -(-self.samples_of_epoch // self.batch)

    @property
    def samples_of_epoch(self) -> int:
        """The samples of an epoch: N / views."""
        return len(self.samples) // self.views

    def of(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in its order, int64 (N / views,). The same epoch gives the same order."""
        if self.seed is None:
            return self.samples
        rng = np.random.default_rng([self.seed, epoch])
        samples = self.samples if self.views == 1 else self._one_view_each(self.seed, epoch)
        return rng.permutation(samples) if self.shuffle_blocks == 0 else self._by_blocks(rng, samples)

    def parts(self, epoch: int, *, start_batch: int = 0) -> Iterator[BatchPart]:
        """Yield this process's part of every batch. Batch k is the same samples for any number of processes."""
        order = self.of(epoch)
        for number in range(start_batch, len(self)):
            whole = order[number * self.batch : (number + 1) * self.batch]
            first, stop = (len(whole) * rank // self.world for rank in (self.rank, self.rank + 1))
            is_stand_in = first == stop
            dealt = whole if self.keepers is None else dealt_to_keepers(whole, self.keepers)
            rows = whole[:1] if is_stand_in else dealt[first:stop]
            yield BatchPart(number=number, rows=rows, total=len(whole), is_stand_in=is_stand_in)

    def _one_view_each(self, seed: int, epoch: int) -> np.ndarray:
        """Return one view of each clip. Every clip has its own order of its views, drawn anew after the last."""
        cycle, number = divmod(epoch, self.views)
        rng = np.random.default_rng([seed, cycle, self.views])
        by_clip = self.samples.reshape(-1, self.views)
        # What is drawn depends on the shape alone: numbers of views are small, and take an eighth of the memory so.
        views = np.tile(np.arange(self.views, dtype=np.min_scalar_type(self.views)), (len(by_clip), 1))
        view = rng.permuted(views, axis=1, out=views)[:, number]
        chosen: np.ndarray = by_clip[np.arange(len(by_clip)), view]
        return chosen

    def _by_blocks(self, rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
        """Return samples group by group of permuted blocks, those of a group shuffled; the time is that of the samples."""
        block_of = samples // self.block_samples
        blocks = rng.permutation(np.flatnonzero(np.bincount(block_of)))
        group_of_block = np.zeros(block_of.max(initial=-1) + 1, dtype=np.min_scalar_type(len(blocks)))
        group_of_block[blocks] = np.arange(len(blocks)) // self.shuffle_blocks
        group_of = group_of_block[block_of]
        del block_of  # as large as the samples
        order: np.ndarray = samples[_stable_order(group_of)]
        ends = np.cumsum(np.bincount(group_of)).tolist()
        for first, stop in pairwise([0, *ends]):
            rng.shuffle(order[first:stop])
        return order


def _stable_order(numbers: np.ndarray) -> np.ndarray:
    """Return `np.argsort(numbers, kind="stable")` of numbers from 0, in time that grows as their count.

    numpy sorts by digits where numbers have 16 bits, and by comparing where they have more.
    """
    order = np.argsort(numbers.astype(np.uint16), kind="stable")  # of the lower bits
    for shift in range(16, int(numbers.max(initial=0)).bit_length(), 16):
        digits = (numbers >> shift).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order


def check_seed(name: str, seed: int | None) -> None:
    """Check a seed, which everything random of a run is drawn from. Raises: UsageError for one out of range."""
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise UsageError(f"{name} is {seed}; expected 0 to {MOST_SEED}")


def dealt_to_keepers(whole: np.ndarray, keepers: Keepers) -> np.ndarray:
    """Return a batch's samples so that, cut into the parts of all processes, each part has what its process keeps.

    Parts stay as large as they are, because processes wait for the largest. What a group keeps beyond its parts, and what
    nobody keeps, fills the parts that are short. Within a group samples stay in their order.
    """
    world = len(keepers.group_of_rank)
    bounds = [len(whole) * rank // world for rank in range(world + 1)]
    place_group = np.repeat(keepers.group_of_rank, np.diff(bounds))  # the group of each place
    taken_by = np.full(len(whole), -1, dtype=np.int64)
    for group in np.unique(place_group):
        mine = np.flatnonzero(keepers.of_row[whole] == group)[: np.count_nonzero(place_group == group)]
        taken_by[mine] = group
    left = np.flatnonzero(taken_by < 0)
    short = [
        np.repeat(group, np.count_nonzero(place_group == group) - np.count_nonzero(taken_by == group))
        for group in np.unique(place_group)
    ]
    taken_by[left] = np.concatenate(short)
    dealt = np.empty_like(whole)
    for group in np.unique(place_group):
        dealt[place_group == group] = whole[taken_by == group]
    return dealt


def shared_out(samples: np.ndarray, capacities: Sequence[int], *, sizes: Sequence[int]) -> np.ndarray:
    """Return the group that keeps each of the samples, int64, -1 for none.

    They are dealt out one by one, as consecutive ones may come in one batch, until a group has as many as it can keep.

    Args:
        samples: in their order.
        capacities: how many each group can keep.
        sizes: processes of each group, which get so many times as many.
    """
    most = [min(capacity, len(samples)) for capacity in capacities]
    turns = [(np.arange(count) + 0.5) / size for count, size in zip(most, sizes, strict=True)]
    groups = np.repeat(np.arange(len(most)), most)
    # Of equal turns the first group's comes first. The turns of each group ascend, and this sort merges what does.
    order = np.argsort(np.concatenate(turns), kind="stable")[: len(samples)]
    keepers = np.full(len(samples), -1, dtype=np.int64)
    keepers[: len(order)] = groups[order]
    return keepers
