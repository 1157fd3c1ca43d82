"""Which samples make which batch of an epoch, and which part of it is whose: one order for any number of processes.

B samples of a global batch, N samples in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        view = rng.permuted(np.tile(np.arange(self.views), (len(by_clip), 1)), axis=1)[:, number]
        chosen: np.ndarray = by_clip[np.arange(len(by_clip)), view]
        return chosen

    def _by_blocks(self, rng: np.random.Generator, samples: np.ndarray) -> np.ndarray:
        block_of = samples // self.block_samples
        blocks = rng.permutation(np.unique(block_of))
        groups = [blocks[i : i + self.shuffle_blocks] for i in range(0, len(blocks), self.shuffle_blocks)]
        return np.concatenate([rng.permutation(samples[np.isin(block_of, group)]) for group in groups])


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
    turns = [(np.arange(capacity) + 0.5) / size for capacity, size in zip(capacities, sizes, strict=True)]
    groups = np.repeat(np.arange(len(capacities)), capacities)
    order = np.lexsort((groups, np.concatenate(turns)))[: len(samples)]
    keepers = np.full(len(samples), -1, dtype=np.int64)
    keepers[: len(order)] = groups[order]
    return keepers
