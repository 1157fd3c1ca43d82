"""The largest batch that fits beside the samples that are kept: found by trying on a GPU, by measuring on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from evl_cache.batches import DEFAULT_BATCH
from evl_cache.errors import UsageError
from evl_cache.heads import Head, SampleMasks
from evl_cache.precision import tf32_as
from evl_cache.processes import (
    MEMORY_SHARE,
    Processes,
    ProcessPlace,
    give_back_memory,
    peak_bytes,
    reset_peak,
)
from evl_cache.runs import head_logits
from evl_cache.store import StoredBatch
from evl_cache.train.memory import (
    GPU_SHARE,
    WEIGHED_SHARE,
    Loads,
    Room,
    StepNeeds,
    keeps_on_host,
    kept_nbytes,
    may_be_recorded,
    steps_beside_kept,
)
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.options import TrainOptions

_SIZES, _SMALL_SIZES = (
    (4, 16),
    (1, 2),
)  # of the batches that are measured; the others on a device that is small


def share_out_memory(
    options: TrainOptions,
    *,
    build: Callable[[], Head],
    probe: Callable[[], StoredBatch],
    loads: Loads,
    recorded: Callable[[], Any] | None,
    processes: Processes,
    on_note: Callable[[str], None] = lambda message: None,
) -> tuple[TrainOptions, int]:
    """Return the options with a number for the batch, where they say `auto`, and the bytes of samples to keep.

    Samples come first, but leave what a batch of the default size needs; the largest batch is looked for in the rest.

    Args:
        build: makes a head as it will be trained.
        probe: reads a few samples as they will be loaded.
        loads: what will be loaded.
        recorded: reads the batch of the run that is resumed, which keeps it; None for a new run.
        processes: that share a batch; the one with the least memory decides.
        on_note: told in a line where fewer samples are kept than was asked for.

    Raises: UsageError where not even one sample fits, or nothing is recorded.
    """
    shared, when = processes.place.world * options.accumulate, "while looking for the largest batch"
    if options.batch == "auto" and recorded is not None:
        found = processes.on_first(recorded, when)
        if not isinstance(found, int):
            raise UsageError(f"the run to resume has batch {found!r}; give its --batch")
        options = replace(options, batch=found)
    cap = loads.num_samples // shared
    if options.batch == "auto" and cap < 2:
        options = replace(options, batch=shared)
    if options.batch != "auto":
        return options, _kept_beside(options, build, probe, loads, processes.place, on_note)
    mine, kept = _largest(options, build, probe(), loads, cap=cap, place=processes.place, on_note=on_note)
    passed = min(processes.gather(mine, when))
    if passed < 1:
        raise UsageError(
            "not even one sample fits into memory; use --accumulate, fewer layers or another device"
        )
    return replace(options, batch=passed * shared), kept


def _kept_beside(
    options: TrainOptions,
    build: Callable[[], Head],
    probe: Callable[[], StoredBatch],
    loads: Loads,
    place: ProcessPlace,
    on_note: Callable[[str], None],
) -> int:
    """Return the bytes of samples that are kept beside a batch that is given. A step is measured where they are many."""
    samples, room = loads.in_pass(options, place), Room.of(options, place)
    needed = float(loads.per_pass(options, place) * loads.beside_kept(options))
    kept = kept_nbytes(options, loads, room, place, needed=needed)
    free = room.host if keeps_on_host(options) or room.device is None else room.device
    if kept > WEIGHED_SHARE * free and steps_beside_kept(options) and loads.num_samples:
        step = _measured(build, probe(), options, cap=max(2, samples))
        copies = 2 if may_be_recorded(options, place) else 1
        needed += 0.0 if step is None else copies * step.of(samples)
        room = Room.of(options, place)  # without what was loaded for the first step
    return kept_nbytes(options, loads, room, place, needed=needed, on_note=on_note)


def _largest(
    options: TrainOptions,
    build: Callable[[], Head],
    features: StoredBatch,
    loads: Loads,
    *,
    cap: int,
    place: ProcessPlace,
    on_note: Callable[[str], None],
) -> tuple[int, int]:
    """Return the most samples of a pass, up to `cap`, and the bytes of samples that are kept beside them."""
    on_gpu = torch.device(options.device).type != "cpu"
    is_recorded = may_be_recorded(options, place)
    least = min(cap, max(1, DEFAULT_BATCH // (place.world * options.accumulate)))
    found: StepNeeds | None = StepNeeds(fixed=0.0, each=0.0)
    if not on_gpu or is_recorded or (options.keep_in is not None and steps_beside_kept(options)):
        found = _measured(build, features, options, cap=cap)
    room = Room.of(options, place)  # when what the first step loads is loaded
    step = found or StepNeeds(fixed=0.0, each=0.0)
    recorded = step if is_recorded else StepNeeds(fixed=0.0, each=0.0)
    steps = step.of(least) + recorded.of(least) if steps_beside_kept(options) else 0.0
    needed = steps + least * loads.beside_kept(options)
    kept = kept_nbytes(options, loads, room, place, needed=needed, on_note=on_note)
    if found is None and not on_gpu:
        return min(cap, DEFAULT_BATCH), kept
    left = MEMORY_SHARE * room.host - (kept if keeps_on_host(options) else 0)
    if not on_gpu:
        return largest_within(left - step.fixed, step.each + loads.on_host(options), cap=cap), kept
    cap = largest_within(left, loads.on_host(options), cap=cap)
    reserved = 0 if keeps_on_host(options) else kept
    largest = largest_on_gpu(
        build,
        features,
        options,
        cap=cap,
        reserved_nbytes=reserved + int(recorded.fixed),
        loaded_nbytes=loads.on_device(options) + int(recorded.each),
    )
    return largest, kept


def _measured(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, cap: int
) -> StepNeeds | None:
    """Return what a step takes; None where that cannot be told."""
    for sizes in (_SIZES, _SMALL_SIZES):
        try:
            return step_nbytes(build, features, options, sizes=(min(sizes[0], cap // 2), min(sizes[1], cap)))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return None


def largest_within(room: float, each: float, *, cap: int) -> int:
    """The most samples, up to `cap`, that fit into so many bytes if each takes so many."""
    return max(0, min(cap, int(room / max(each, 1.0))))


def largest_on_gpu(
    build: Callable[[], Head],
    features: StoredBatch,
    options: TrainOptions,
    *,
    cap: int,
    reserved_nbytes: int = 0,
    loaded_nbytes: int = 0,
) -> int:
    """The most samples, up to `cap`, that a pass has memory for: sizes are tried until it runs out; less a margin.

    Args:
        reserved_nbytes: that other things will take.
        loaded_nbytes: that the loader will hold for each sample.
    """

    def fits(batch: int) -> bool:
        others: list[torch.Tensor] = []
        try:
            others.extend(reserve(n, options.device) for n in (reserved_nbytes, batch * loaded_nbytes))
            training_step(build(), features, options, batch=batch)
        except torch.OutOfMemoryError:
            return False
        finally:
            others.clear()
            torch.cuda.empty_cache()
        return True

    largest = largest_that(fits, cap=cap)
    return largest if largest == cap else int(GPU_SHARE * largest) or largest


def reserve(nbytes: int, device: str) -> torch.Tensor:
    """Take memory of a device."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


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


def step_nbytes(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, sizes: tuple[int, int]
) -> StepNeeds | None:
    """Measure a step with each of two batches; None where the system does not tell what it takes."""
    device, taken = torch.device(options.device), []
    training_step(build(), features, options, batch=1)  # what a process sets up once is no step's
    for size in sizes:
        if not reset_peak(device):
            return None
        before = peak_bytes(device)
        training_step(build(), features, options, batch=size)
        taken.append(peak_bytes(device) - before)
    give_back_memory(device)
    each = max(0.0, (taken[1] - taken[0]) / (sizes[1] - sizes[0]))
    return StepNeeds(fixed=max(0.0, taken[0] - each * sizes[0]), each=each)


def training_step(head: Head, features: StoredBatch, options: TrainOptions, *, batch: int) -> None:
    """Take an optimiser step of a head on a batch of `batch` samples, which are the given ones repeated.

    One on a single sample comes first: from then on the optimiser has its moments, which most steps of a training take
    beside everything else, and what is set up once is there.
    """
    device = torch.device(options.device)
    head = head.to(device).train()
    optimisation, masks = Optimisation(head, options, total_steps=2), SampleMasks(head)
    for step, size in enumerate((1, batch)):
        optimisation.begin(step)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        with tf32_as(options.precision, device), masks.of(torch.arange(size, device=device)):
            logits = head_logits(head, features.to(device).repeated(size), options.precision)
            optimisation.backward(torch.nn.functional.cross_entropy(logits, labels))
        del logits
        optimisation.finish(step)
