"""Which heads of a sweep fit into memory together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from evl_cache.heads import Head
from evl_cache.processes import available_bytes, peak_bytes, reset_peak
from evl_cache.store import StoredBatch
from evl_cache.train import TrainOptions, training_step

MEMORY_SHARE = 0.7  # of what is available: others want memory too
_SAMPLES = (1, 3)
RunT = TypeVar("RunT")


@dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """Bytes of a head in training. state: always (parameters, gradients, moments, average); step: while it steps."""

    state: int
    step: int


def head_memory(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, batch: int
) -> HeadMemory:
    """What a head takes, from two small steps. features: a sample as it will be loaded; batch: of one pass."""
    head = build()
    parameters = sum(p.numel() * p.element_size() for p in head.parameters())
    state = parameters * (4 if options.ema is None else 5)
    device, taken = torch.device(options.device), []
    for samples in _SAMPLES:
        if not _reset(device):
            return HeadMemory(state=state, step=0)
        before = _peak(device)
        training_step(build(), features, options, batch=samples)
        taken.append(_peak(device) - before)
    each = max(0.0, (taken[1] - taken[0]) / (_SAMPLES[1] - _SAMPLES[0]))
    return HeadMemory(state=state, step=int(each * batch))


def split_passes(
    runs: Sequence[RunT], memory: Callable[[RunT], HeadMemory], *, room: int, shared: int
) -> list[list[RunT]]:
    """Runs that are trained together, in their order: heads step one after another, so the largest step counts once.

    A head that does not fit alone has a pass of its own, as it would have a training of its own.

    Args:
        room: bytes there are. shared: of a batch's features.
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


def available_room(device: torch.device) -> int:
    """Bytes for a sweep where nobody says: a share of what is available."""
    return int(MEMORY_SHARE * available_bytes(device))


def _reset(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return reset_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()
