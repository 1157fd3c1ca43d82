"""The largest batch in a bounded memory: our head, the frozen tower with the plain twin, the tower trained itself."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.support.device_features import (
    Inputs,
    Side,
    known_paths,
    new_decoder,
    stored_features,
    through,
)
from benchmarks.support.device_place import Place, median_seconds, release
from benchmarks.support.device_runner import Clock, Measurement, Values
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.decoder.plain import PlainHead

STORE = ("numcodecs", "awscrt")
StepMaker = Callable[[int], Callable[[], None]]


def largest_measurements(place: Place) -> list[Measurement]:
    """The three sides, each in a process of its own, as the limit is that of a process."""
    return [
        Measurement(
            name=f"largest.{what}",
            call=_of_largest(place, what),
            seconds=25,
            needs=STORE if what == "ours" else ("timm", *STORE),
            alone=True,
        )
        for what in _MAKERS
    ]


def _of_largest(place: Place, what: str) -> Callable[[Clock], Iterator[Values]]:
    return lambda clock: _largest(place, what, clock)


def _largest(place: Place, what: str, clock: Clock) -> Iterator[Values]:
    """The largest batch within the limit of memory, and the seconds a clip there."""
    from evl_cache.train.batch_size import largest_that

    if place.is_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, place.sizes.limit_gb * 1e9 / total))
    maker = _MAKERS[what](place)

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
        took = median_seconds(place, maker(size))
        yield {
            "timed_batch": size,
            "ms_a_clip": round(1e3 * took / size, 3),
            "clips_per_s": round(size / took, 1),
        }


def _our_step(place: Place) -> StepMaker:
    head = new_decoder(place.sizes, place.device)
    path = next(iter(known_paths(place)), None)

    def maker(batch: int) -> Callable[[], None]:
        inputs = stored_features(place.sizes, batch, place.device)
        return through(Side(head=head, inputs=inputs, precision=place.half).step(place), path)

    return maker


def _tower_and_twin_step(place: Place) -> StepMaker:
    """Training without a cache: the frozen tower's forward pass, then a step of the plain twin."""
    from benchmarks.support.device_towers import image_tower, random_frames

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


def _head_for(place: Place, inputs: Inputs) -> EVLHead:
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
    from benchmarks.support.device_towers import image_tower, random_frames

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


_MAKERS: dict[str, Callable[[Place], StepMaker]] = {
    "ours": _our_step,
    "frozen_tower_and_twin": _tower_and_twin_step,
    "fine_tuning": _fine_tuning_step,
}
