"""The largest batch that fits: found by trying on a GPU, by measuring on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from evl_cache.batches import DEFAULT_BATCH
from evl_cache.errors import UsageError
from evl_cache.heads import Head
from evl_cache.precision import tf32_as
from evl_cache.processes import MEMORY_SHARE, Processes, available_bytes, peak_bytes, reset_peak
from evl_cache.runs import head_logits
from evl_cache.store import StoredBatch
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.options import TrainOptions

GPU_SHARE = 0.9  # of the largest that fits: memory is fragmented differently in every step
_CPU_SIZES = (4, 16)
_LOADED_AHEAD = 3  # batches that the loader holds beside the one in use


def resolve_batch(
    options: TrainOptions,
    *,
    build: Callable[[], Head],
    probe: Callable[[], StoredBatch],
    num_samples: int,
    sample_nbytes: int,
    recorded: Callable[[], Any] | None,
    processes: Processes,
) -> TrainOptions:
    """Return the options with a number for the batch, where they say `auto`.

    Args:
        build: makes a head as it will be trained.
        probe: reads a few samples as they will be loaded.
        num_samples: of the training; no batch is larger.
        sample_nbytes: bytes that a loader holds of each.
        recorded: reads the batch of the run that is resumed, which keeps it; None for a new run.
        processes: that share a batch; the one with the least memory decides.

    Raises: UsageError where not even one sample fits, or nothing is recorded.
    """
    if options.batch != "auto":
        return options
    when = "while looking for the largest batch"
    if recorded is not None:
        found = processes.on_first(recorded, when)
        if not isinstance(found, int):
            raise UsageError(f"the run to resume has batch {found!r}; give its --batch")
        return replace(options, batch=found)
    shared = processes.place.world * options.accumulate
    device = torch.device(options.device)
    cap = num_samples // shared
    if cap < 2:
        return replace(options, batch=shared)
    if device.type == "cuda":
        mine = largest_on_gpu(build, probe(), options, cap=cap)
    else:
        loaded, sharing = _LOADED_AHEAD * sample_nbytes, processes.place.local_world
        mine = largest_on_cpu(build, probe(), options, cap=cap, loaded_nbytes=loaded, sharing=sharing)
    passed = min(processes.gather(mine, when))
    if passed < 1:
        raise UsageError(
            "not even one sample fits into memory; use --accumulate, fewer layers or another device"
        )
    return replace(options, batch=passed * shared)


def largest_on_gpu(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, cap: int
) -> int:
    """The most samples, up to `cap`, that a pass has memory for: sizes are tried until it runs out; less a margin."""

    def fits(batch: int) -> bool:
        try:
            training_step(build(), features, options, batch=batch)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    largest = largest_that(fits, cap=cap)
    return largest if largest == cap else int(GPU_SHARE * largest) or largest


def largest_that(fits: Callable[[int], bool], *, cap: int) -> int:
    """The largest number of 1 .. cap that fits, to within a sixteenth, or 0 where 1 does not.

    It is doubled while it fits, then bisected.
    """
    good, bad = 0, cap + 1
    while good < cap:
        size = min(max(1, 2 * good), cap)
        if not fits(size):
            bad = size
            break
        good = size
    while bad - good > max(1, good // 16):
        size = (good + bad) // 2
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def largest_on_cpu(
    build: Callable[[], Head],
    features: StoredBatch,
    options: TrainOptions,
    *,
    cap: int,
    loaded_nbytes: int = 0,
    sharing: int = 1,
) -> int:
    """The most samples, up to `cap`, that a pass has memory for, reckoned from what two small batches take.

    Args:
        loaded_nbytes: bytes that the loader holds for each.
        sharing: processes that share the memory.
    """
    sizes = min(_CPU_SIZES[0], cap), min(_CPU_SIZES[1], cap)
    if sizes[0] == sizes[1]:
        return cap
    taken = step_nbytes(build, features, options, sizes=sizes)
    if taken is None:
        return min(cap, DEFAULT_BATCH)
    fixed, each = taken
    room = MEMORY_SHARE * available_bytes(torch.device("cpu")) / sharing - fixed
    return max(0, min(cap, int(room / (max(each, 1.0) + loaded_nbytes))))


def step_nbytes(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, sizes: tuple[int, int]
) -> tuple[float, float] | None:
    """Measure a step with each of two batches: the bytes that it takes by itself, and those for each sample.

    None where the system does not tell.
    """
    device, taken = torch.device(options.device), []
    for size in sizes:
        if not reset_peak(device):
            return None
        before = peak_bytes(device)
        training_step(build(), features, options, batch=size)
        taken.append(peak_bytes(device) - before)
    each = max(0.0, (taken[1] - taken[0]) / (sizes[1] - sizes[0]))
    return max(0.0, taken[0] - each * sizes[0]), each


def training_step(head: Head, features: StoredBatch, options: TrainOptions, *, batch: int) -> None:
    """Take one optimiser step of a head on a batch of `batch` samples, which are the given ones repeated."""
    device = torch.device(options.device)
    head = head.to(device).train()
    optimisation = Optimisation(head, options, total_steps=1)
    optimisation.begin(0)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    with tf32_as(options.precision, device):
        logits = head_logits(head, features.to(device).repeated(batch), options.precision)
        optimisation.backward(torch.nn.functional.cross_entropy(logits, labels))
    optimisation.finish(0)
