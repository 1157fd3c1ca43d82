"""Which heads of a sweep fit into memory together, beside the samples that are kept and what loaders hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from evl_cache.canonical_json import digest
from evl_cache.heads import Head
from evl_cache.processes import ProcessPlace
from evl_cache.store import FeatureCache, Reads, StoredBatch
from evl_cache.sweep.shared_pass import PlannedRun
from evl_cache.train import (
    Loads,
    Room,
    TrainOptions,
    all_reads,
    kept_nbytes,
    run_config,
    step_nbytes,
    steps_beside_kept,
)

# Runs that differ in these see other batches, or the same ones otherwise: they are not trained in one pass.
_OF_A_PASS = ("epochs", "steps", "batch", "accumulate", "precision", "shuffle_blocks")
_SAMPLES = (2, 8)  # of the steps that are measured
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


@dataclass(frozen=True, kw_only=True)
class SharedRuns:
    """Runs that are trained together.

    Attributes:
        runs: in their order.
        kept_nbytes: of samples that are kept meanwhile.
    """

    runs: Sequence[PlannedRun]
    kept_nbytes: int


def plan_passes(
    runs: Sequence[PlannedRun],
    caches: tuple[FeatureCache, FeatureCache],
    samples: tuple[np.ndarray, np.ndarray],
    *,
    memory_bytes: int | None,
    on_note: Callable[[str], None],
) -> list[SharedRuns]:
    """Split runs into passes: those that see the same batches, as many at once as memory holds.

    Args:
        caches, samples: of both sides.
        memory_bytes: most that heads, a part's features and loaders may take; by default what is free, less what is kept.
        on_note: told in a line where fewer samples are kept than was asked for.
    """
    alike: dict[tuple[Any, ...], list[PlannedRun]] = {}
    for planned in runs:
        alike.setdefault(tuple(getattr(planned.run.options, name) for name in _OF_A_PASS), []).append(planned)
    return [
        part for group in alike.values() for part in _fitting(group, caches, samples, memory_bytes, on_note)
    ]


def _fitting(
    runs: Sequence[PlannedRun],
    caches: tuple[FeatureCache, FeatureCache],
    samples: tuple[np.ndarray, np.ndarray],
    memory_bytes: int | None,
    on_note: Callable[[str], None],
) -> list[SharedRuns]:
    """Split runs that see the same batches. Arguments as `plan_passes`."""
    options, place = runs[0].run.options, ProcessPlace()
    together = all_reads([p.reads for p in runs])
    loads = Loads.of(caches, samples, together)
    in_pass = loads.in_pass(options, place)
    memory = _memories(caches[0], samples[0], in_pass)
    largest = max(needs.state + needs.step for needs in map(memory, runs))
    room = Room.of(options, place)  # when what the first step loads is loaded
    # One part at a time is decoded; loaders hold whole batches.
    loaded = loads.on_host(options) if room.device is None else loads.on_device(options)
    decoded = max(_decoded_nbytes(cache, together) for cache in caches)
    shared = in_pass * decoded + loads.per_pass(options, place) * loaded
    needed: float = loads.per_pass(options, place) * loads.beside_kept(options)
    if steps_beside_kept(options):
        # Samples that are kept come first, and leave what the largest head needs, or what the user gives to heads.
        needed = shared + largest if memory_bytes is None else memory_bytes
    kept = kept_nbytes(options, loads, room, place, needed=needed, on_note=on_note)
    left = room.for_steps(options, kept=kept) if memory_bytes is None else memory_bytes
    return [
        SharedRuns(runs=part, kept_nbytes=kept)
        for part in split_passes(runs, memory, room=left, shared=shared)
    ]


def _decoded_nbytes(cache: FeatureCache, reads: Reads) -> int:
    """Return the bytes of a sample that all heads of a pass share: in float32, tokens once more as heads normalise them."""
    values = {name: t.numel() for name, t in cache.buffers(slots=1, reads=reads).whole.items()}
    tokens = values.get("tokens", 0) + values.get("class_tokens", 0)
    maps = values.get("maps", 0)
    if reads.with_maps and cache.spec.recomputes_maps:  # made of the tokens, and then as those that are read
        frames, patches = cache.spec.views.frames, cache.spec.num_tokens - 1
        maps = 2 * len(reads.layers) * 2 * (frames - 1) * patches**2
    return 4 * (2 * tokens + maps)


def _memories(cache: FeatureCache, samples: np.ndarray, in_pass: int) -> Callable[[PlannedRun], HeadMemory]:
    """Return what tells the memory of a run's head; runs that differ in their learning rate, say, are measured once."""
    known: dict[str, HeadMemory] = {}
    served = samples[cache.is_valid[samples]][:1].tolist()

    def memory(planned: PlannedRun) -> HeadMemory:
        options = planned.run.options
        config = run_config(cache, {}, options, planned.reads.layers)
        key = digest([options.head, config.layers, config.head_config, options.ema])
        if key not in known:
            probe = cache.read_stored(served, planned.reads)
            known[key] = head_memory(config.build, probe, options, batch=in_pass)
        return known[key]

    return memory


def head_memory(
    build: Callable[[], Head], features: StoredBatch, options: TrainOptions, *, batch: int
) -> HeadMemory:
    """Measure what a head takes, in two small steps.

    Args:
        features: a sample as it will be loaded.
        batch: samples of a forward pass.
    """
    head = build()
    parameters = sum(p.numel() * p.element_size() for p in head.parameters())
    state = parameters * (4 if options.ema is None else 5)
    taken = step_nbytes(build, features, options, sizes=_SAMPLES)
    return HeadMemory(state=state, step=0 if taken is None else max(0, int(taken.of(batch)) - state))


def split_passes(
    runs: Sequence[RunT], memory: Callable[[RunT], HeadMemory], *, room: float, shared: int
) -> list[list[RunT]]:
    """Split runs, in their order, into passes whose heads fit into memory together.

    Heads step one after another, so the largest step counts once. A head that does not fit alone gets a pass of its
    own, as it would have a training of its own.

    Args:
        room: bytes that there are.
        shared: bytes of what loaders hold, and of a part's features as they are decoded.
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
