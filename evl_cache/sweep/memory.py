"""Which heads of a sweep fit into memory together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from evl_cache.heads import Head
from evl_cache.store import StoredBatch
from evl_cache.train import TrainOptions, step_nbytes

_SAMPLES = (1, 3)
RunT = TypeVar("RunT")


@dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """Bytes that a head takes in training.

    Attributes:
        state: all the time (parameters, gradients, moments, average).
        step: while it takes a step.
    """

    state: int
    step: int


def head_memory(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, batch: int
) -> HeadMemory:
    """Measure what a head takes, in two small steps.

    Args:
        features: a sample as it will be loaded.
        batch: samples of a pass.
    """
    head = build()
    parameters = sum(p.numel() * p.element_size() for p in head.parameters())
    state = parameters * (4 if options.ema is None else 5)
    taken = step_nbytes(build, features, options, sizes=_SAMPLES)
    return HeadMemory(state=state, step=0 if taken is None else int(taken[1] * batch))


def split_passes(
    runs: Sequence[RunT], memory: Callable[[RunT], HeadMemory], *, room: float, shared: int
) -> list[list[RunT]]:
    """Split runs, in their order, into passes whose heads fit into memory together.

    Heads step one after another, so the largest step counts once. A head that does not fit alone gets a pass of its
    own, as it would have a training of its own.

    Args:
        room: bytes that there are.
        shared: bytes of a batch's features.
    """
    passes: list[list[RunT]] = []
    state = step = 0
    for run in runs:
        needs = memory(run)
        state, step = state + needs.state, max(step, needs.step)
        if not passes or shared + state + step > room:
            passes.append([])
            state, step = needs.state, needs.step
        passes[-1].append(run)
    return passes
