"""The head on a device: clips a second, launches, share of bandwidth, memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.support.device_features import (
    Side,
    known_paths,
    nbytes,
    ours_and_twin,
    stored_features,
    tf32,
    through,
)
from benchmarks.support.device_largest import largest_measurements
from benchmarks.support.device_place import Place, is_lost, median_seconds, release, seconds_of, timed
from benchmarks.support.device_runner import Clock, Measurement, Skipped, Values

_MATRIX = 8192
_READS = 2  # codes must be read forward and backward


def measurements(place: Place) -> list[Measurement]:
    """Everything that is measured of the head, in order."""
    batches = place.sizes.batches
    middle = batches[1]
    return [
        Measurement(name="rates", call=lambda clock: _rates(place), seconds=20),
        *(
            Measurement(
                name=f"step.{batch}", call=_of_batch(place, batch), seconds=40 if batch == middle else 25
            )
            for batch in (middle, *(b for b in batches if b != middle))
        ),
        Measurement(name="launches", call=lambda clock: _launches(place), seconds=25),
        *largest_measurements(place),
        Measurement(
            name="compiled.plain_twin", call=lambda clock: _compiled(place, "plain_twin", clock), seconds=60
        ),
        Measurement(name="precisions", call=lambda clock: _precisions(place, clock), seconds=20),
        Measurement(name="compiled.ours", call=lambda clock: _compiled(place, "ours", clock), seconds=60),
    ]


def _of_batch(place: Place, batch: int) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _steps(place, batch, clock)


def _rates(place: Place) -> Iterator[Values]:
    """What the device can do: a large copy within it (its bandwidth), copies to it, and a product of matrices."""
    yield {"copy_gb_per_s": round(copy_rate(place) / 1e9, 1)}
    count = place.sizes.copy_mb << 20
    if place.is_gpu:
        there = torch.empty(count, dtype=torch.uint8, device=place.device)
        for name, host in (
            ("pinned", torch.empty(count, dtype=torch.uint8, pin_memory=True)),
            ("pageable", torch.zeros(count, dtype=torch.uint8)),
        ):
            took = median_seconds(place, lambda host=host: there.copy_(host, non_blocking=True))
            yield {f"to_device_{name}_gb_per_s": round(count / took / 1e9, 2)}
        del there
    n = _MATRIX if place.is_gpu else 256
    dtype = getattr(torch, place.half)
    a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
    took = median_seconds(place, lambda: torch.mm(a, b))
    yield {f"matmul_{place.half}_tflop_per_s": round(2 * n**3 / took / 1e12, 3)}
    one = stored_features(place.sizes, 1, place.device)
    yield {"stored_mb_a_clip": round(nbytes(one) / 1e6, 3)}


def copy_rate(place: Place) -> float:
    """The bytes a second that a large copy within the device reads and writes, both counted."""
    count = place.sizes.copy_mb << 20
    source = torch.zeros(count, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * count / median_seconds(place, lambda: target.copy_(source))


def _steps(place: Place, batch: int, clock: Clock) -> Iterator[Values]:
    """A training step of ours by each path, and of the plain twin, in turns; each side's memory first."""
    bandwidth = copy_rate(place)
    ours, twin = ours_and_twin(place, batch, place.half)
    sides: dict[str, tuple[Side, Callable[[], None]]] = {}
    ours_step = ours.step(place)
    for path in known_paths(place) or [None]:
        sides["ours" if path is None else f"ours.{path}"] = (ours, through(ours_step, path))
    sides["plain_twin"] = (twin, twin.step(place))
    memory: dict[str, Any] = {}
    for name, (side, step) in sides.items():
        memory[name] = _memory(place, side, step, batch)
        release(place)
        yield {"precision": place.half, "peak_mb_a_clip": memory}
    calls = {name: step for name, (_, step) in sides.items() if not isinstance(memory[name], str)}
    found = timed(calls, place, clock)
    rates: dict[str, Any] = {}
    for name, took in found.items():
        if isinstance(took, str):
            rates[name] = took
            continue
        rate = batch / took["seconds"]
        moved = _READS * nbytes(ours.inputs) / batch * rate
        rates[name] = {
            "clips_per_s": round(rate, 1),
            "ms": round(1e3 * took["seconds"], 3),
            "spread": took["spread"],
            "rounds": took["rounds"],
            # Of codes that are read twice; the twin reads more, of which this says nothing.
            **({"share_of_bandwidth": round(moved / bandwidth, 4)} if name != "plain_twin" else {}),
        }
    yield {"steps": rates, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    yield _ratios(rates)


def _memory(place: Place, side: Side, step: Callable[[], None], batch: int) -> float | str | None:
    """Return the megabytes that a clip takes in a step, inputs included; why there are none; None on a CPU."""
    try:
        step()  # the optimiser's moments are there now
        taken = place.peak(step)
    except torch.OutOfMemoryError:
        release(place)
        return "out of memory"
    except Exception as error:
        if is_lost(error):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if taken is None else round((taken + nbytes(side.inputs)) / batch / 1e6, 2)


def _ratios(rates: dict[str, Any]) -> Values:
    twin = rates.get("plain_twin")
    if not isinstance(twin, dict):
        return {}
    return {
        "vs_plain_twin": {
            name: round(rate["clips_per_s"] / twin["clips_per_s"], 2)
            for name, rate in rates.items()
            if isinstance(rate, dict) and name != "plain_twin"
        }
    }


def _launches(place: Place) -> Iterator[Values]:
    """Kernels that a step launches, by torch's profiler; beside it the count on fake tensors."""
    from benchmarks.launches import step_launches

    found: dict[str, Any] = {}
    for precision in (place.half, "float32"):
        ours, twin = ours_and_twin(place, place.sizes.batches[0], precision)
        step = ours.step(place)
        sides = {"ours" if p is None else f"ours.{p}": through(step, p) for p in known_paths(place) or [None]}
        for name, call in {**sides, "plain_twin": twin.step(place)}.items():
            try:
                found[f"{name}.{precision}"] = launches_of(call, place)
            except torch.OutOfMemoryError:
                found[f"{name}.{precision}"] = "out of memory"
                release(place)
            yield {"by_profiler": found}
    if place.is_gpu:  # counted at these sizes, of which a processor has none
        counted = {
            f"{name}.{precision}": step_launches(name, precision, batch=place.sizes.batches[0]).launches
            for name in (f"decoder{place.sizes.layers}", "plain_twin")
            for precision in (place.half, "float32")
        }
        yield {"on_fake_tensors": counted}


def launches_of(step: Callable[[], None], place: Place) -> dict[str, int]:
    """Count a step's kernels, copies and fills on a GPU, and the operations that torch dispatched."""
    from torch.profiler import ProfilerActivity, profile

    step()
    place.synchronize()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.is_gpu else [])]
    with profile(activities=kinds) as profiled:
        step()
        place.synchronize()
    events = profiled.events() or []
    on_device = [e for e in events if str(e.device_type).endswith("CUDA")]
    moved = sum(e.name.startswith(("Memcpy", "Memset")) for e in on_device)
    dispatched = sum(e.name.startswith("aten::") for e in events)
    return {"kernels": len(on_device) - moved, "copies_and_fills": moved, "operations": dispatched}


def _compiled(place: Place, what: str, clock: Clock) -> Iterator[Values]:
    """The step of a head that `torch.compile` compiled, and how long that took."""
    if not hasattr(torch, "compile"):
        raise Skipped("this torch has no compile")
    batch = place.sizes.batches[1]
    ours, twin = ours_and_twin(place, batch, place.half)
    side = ours if what == "ours" else twin
    # Compiling for a processor takes minutes and tells nothing of a GPU: there it is only traced.
    backend = "inductor" if place.is_gpu else "eager"
    compiled = Side(
        head=torch.compile(side.head, backend=backend), inputs=side.inputs, precision=side.precision
    )  # type: ignore[arg-type]
    path = _compiled_path(place) if what == "ours" else None
    step = through(compiled.step(place), path)
    yield {"compiling_s": round(seconds_of(step, place), 1), "batch": batch, "path": path, "backend": backend}
    eager = through(side.step(place), path)
    found = timed({"compiled": step, "eager": eager}, place, clock)
    yield {
        name: told if isinstance(told, str) else round(batch / told["seconds"], 1)
        for name, told in found.items()
    }


def _compiled_path(place: Place) -> str | None:
    """The path that is compiled: on a CPU the one of few operations, as tracing the other takes long."""
    paths = known_paths(place)
    return None if not paths else paths[0 if place.is_gpu else -1]


def _precisions(place: Place, clock: Clock) -> Iterator[Values]:
    """Ours, by the path that it chooses, in every precision."""
    batch, found = place.sizes.batches[1], dict[str, Any]()
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        if precision == "tf32" and not place.is_gpu:
            continue
        ours, _ = ours_and_twin(place, batch, precision)
        with tf32(precision == "tf32"):
            told = timed({"ours": ours.step(place)}, place, clock)["ours"]
        found[precision] = told if isinstance(told, str) else round(batch / told["seconds"], 1)
        yield {"batch": batch, "clips_per_s": found}
