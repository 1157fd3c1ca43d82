"""The head on a device: clips a second, launches, bandwidth, memory, and the largest batch beside a tower."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.support.device_features import (
    Inputs,
    Side,
    known_paths,
    nbytes,
    new_decoder,
    ours_and_twin,
    stored_features,
    tf32,
    through,
)
from benchmarks.support.device_place import Place, is_lost, release, seconds_of, timed
from benchmarks.support.device_runner import Clock, Measurement, Skipped, Values
from benchmarks.support.device_towers import image_tower, random_frames
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.train.batch_size import largest_that

_MATRIX = 8192
_READS = 2  # codes must be read forward and backward


def head_measurements(place: Place) -> list[Measurement]:
    """Everything that is measured of the head, in order."""
    batches = place.sizes.batches
    middle = batches[1]
    return [
        Measurement(name="rates", call=lambda clock: _rates(place), seconds=20),
        *(
            Measurement(name=f"step.{batch}", call=_of_batch(place, batch), seconds=25)
            for batch in (middle, *(b for b in batches if b != middle))
        ),
        Measurement(name="launches", call=lambda clock: _launches(place), seconds=25),
        *(
            Measurement(
                name=f"largest.{what}",
                call=_of_largest(place, what),
                seconds=25,
                needs=() if what == "ours" else ("timm",),
                alone=True,
            )
            for what in ("ours", "frozen_tower_and_twin", "fine_tuning")
        ),
        Measurement(
            name="compiled.plain_twin", call=lambda clock: _compiled(place, "plain_twin", clock), seconds=60
        ),
        Measurement(name="precisions", call=lambda clock: _precisions(place, clock), seconds=20),
        Measurement(name="compiled.ours", call=lambda clock: _compiled(place, "ours", clock), seconds=60),
    ]


def _of_batch(place: Place, batch: int) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _steps(place, batch, clock)


def _of_largest(place: Place, what: str) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _largest(place, what, clock)


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
            took = _median(place, lambda host=host: there.copy_(host, non_blocking=True))
            yield {f"to_device_{name}_gb_per_s": round(count / took / 1e9, 2)}
        del there
    n = _MATRIX if place.is_gpu else 256
    dtype = getattr(torch, place.half)
    a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
    took = _median(place, lambda: torch.mm(a, b))
    yield {f"matmul_{place.half}_tflop_per_s": round(2 * n**3 / took / 1e12, 3)}
    one = stored_features(place.sizes, 1, place.device)
    yield {"stored_mb_a_clip": round(nbytes(one) / 1e6, 3)}


def copy_rate(place: Place) -> float:
    """The bytes a second that a large copy within the device reads and writes, both counted."""
    count = place.sizes.copy_mb << 20
    source = torch.zeros(count, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * count / _median(place, lambda: target.copy_(source))


def _median(place: Place, call: Callable[[], object]) -> float:
    seconds_of(call, place)
    return sorted(seconds_of(call, place) for _ in range(5))[2]


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
    try:
        from benchmarks import launches  # type: ignore[attr-defined]  # noqa: F401
    except ImportError:
        yield {"on_fake_tensors": "benchmarks.launches is not there"}
    else:
        yield {"on_fake_tensors": "python -m benchmarks.launches --json"}


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


def _largest(place: Place, what: str, clock: Clock) -> Iterator[Values]:
    """The largest batch within the limit of memory, and the seconds a clip there."""
    if place.is_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, place.sizes.limit_gb * 1e9 / total))
    build = {
        "ours": _our_step,
        "frozen_tower_and_twin": _tower_and_twin_step,
        "fine_tuning": _fine_tuning_step,
    }[what]
    maker = build(place)

    def fits(batch: int) -> bool:
        if clock.left_s < 3:
            return False
        try:
            step = maker(batch)
            step()
            step()
        except torch.OutOfMemoryError:
            return False
        finally:
            release(place)
        return True

    batch = largest_that(fits, cap=place.sizes.most_batch)
    yield {"limit_gb": place.sizes.limit_gb, "largest_batch": batch, "stopped_by_time": clock.left_s < 3}
    if batch:
        size = max(1, int(0.9 * batch))
        took = _median(place, maker(size))
        yield {
            "timed_batch": size,
            "ms_a_clip": round(1e3 * took / size, 3),
            "clips_per_s": round(size / took, 1),
        }


StepMaker = Callable[[int], Callable[[], None]]


def _our_step(place: Place) -> StepMaker:
    head = new_decoder(place.sizes, place.device)
    path = next(iter(known_paths(place)), None)

    def maker(batch: int) -> Callable[[], None]:
        inputs = stored_features(place.sizes, batch, place.device)
        return through(Side(head=head, inputs=inputs, precision=place.half).step(place), path)

    return maker


def _tower_and_twin_step(place: Place) -> StepMaker:
    """Training without a cache: the frozen tower's forward pass, then a step of the plain twin."""
    dtype = getattr(torch, place.half)
    tower = image_tower(place, place.sizes.towers[0], dtype=dtype)
    head: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

    def maker(batch: int) -> Callable[[], None]:
        frames = random_frames(place, tower, batch, dtype)

        def step() -> None:
            nonlocal head, optimizer
            features = tower.backbone(frames)
            layers = sorted(features.maps)[-place.sizes.layers :]
            inputs: Inputs = ([features.tokens[n] for n in layers], [features.maps[n] for n in layers])
            del features
            if head is None:
                head = PlainHead(_head_for(place, inputs)).to(place.device)
                optimizer = torch.optim.AdamW(head.parameters(), fused=True)
            _plain_step(place, head, optimizer, lambda model: model(*inputs), batch)

        return step

    return maker


def _head_for(place: Place, inputs: Inputs) -> Any:
    from evl_cache.heads.decoder.evl import EVLHead

    tokens, maps = inputs[0][0], inputs[1][0]
    side = round(maps.shape[-1] ** 0.5)
    return EVLHead(
        num_layers=len(inputs[0]),
        width=tokens.shape[-1],
        num_frames=tokens.shape[1],
        grid=(side, side),
        num_classes=place.sizes.classes,
    )


def _fine_tuning_step(place: Place) -> StepMaker:
    """The tower itself trained: class tokens of the last layer, averaged over frames, and a linear classifier."""
    tower = image_tower(place, place.sizes.towers[0], dtype=torch.float32)
    visual = tower.visual.requires_grad_(True)
    classifier = nn.Linear(tower.width, place.sizes.classes).to(place.device)
    model = nn.ModuleList([visual, classifier])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def maker(batch: int) -> Callable[[], None]:
        frames = random_frames(place, tower, batch, torch.float32)

        def logits(_: nn.Module) -> torch.Tensor:
            tokens = tower.class_tokens(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # (B,T,C)
            result: torch.Tensor = classifier(tokens.mean(1))
            return result

        return lambda: _plain_step(place, model, optimizer, logits, batch)

    return maker


def _plain_step(
    place: Place, model: nn.Module, optimizer: Any, logits: Callable[[nn.Module], torch.Tensor], batch: int
) -> None:
    labels = torch.zeros(batch, dtype=torch.int64, device=place.device)
    with place.autocast(place.half):
        loss = F.cross_entropy(logits(model).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
