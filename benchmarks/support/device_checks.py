"""What must be right on a device before anything is timed on it: decoder steps, every head, maps made again.

`benchmarks.device` runs these, and so do the tests in tests/gpu/. Each yields figures, and raises AssertionError where
something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.support.device_features import (
    Inputs,
    by_path,
    decoded,
    known_paths,
    new_decoder,
    stored_features,
    tf32,
)
from benchmarks.support.device_place import Place, Sizes
from benchmarks.support.device_runner import Skipped, Values
from evl_cache.attention_maps import MapProjection, adjacent_frame_maps
from evl_cache.heads import HEADS, Head, build_head
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.quantize import QuantizedTokens, dequantize_tokens

if TYPE_CHECKING:
    from evl_cache.store import StoredBatch

# Relative errors that rounding alone explains; beyond them ours may err twice as much as the plain twin does.
ROUNDING = {"float32": 2e-4, "tf32": 4e-3, "bfloat16": 2e-2, "float16": 4e-3}
_TIMES_THE_TWIN = 2.0
_SMALL = 1e-5  # of the largest gradient: such a one is rounding alone, as that of the key bias


def shapes_of(sizes: Sizes) -> dict[str, tuple[Sizes, int]]:
    """Sizes and batches at which steps are compared: the usual one, and odd ones."""
    odd = replace(sizes, layers=2, frames=2, grid=(3, 5), width=160, heads=5)
    return {
        "usual": (replace(sizes, layers=2, classes=5), 4),
        "two_frames_five_heads": (odd, 3),
        "one_frame": (replace(odd, frames=1, grid=(4, 4)), 2),
        "one_clip": (replace(odd, frames=3, width=192, heads=12, grid=(5, 2)), 1),
    }


def step_against_twin(place: Place, precision: str, path: str | None) -> Iterator[Values]:
    """Logits and gradients of ours against the plain twin's in float64; the twin in the same precision errs too."""
    if precision == "bfloat16" and not place.has_bfloat16:
        raise Skipped("the card computes bfloat16 slowly")
    if precision == "tf32" and not place.is_gpu:
        raise Skipped("needs a CUDA device")
    wrong = []
    for name, (sizes, batch) in shapes_of(place.sizes).items():
        head = new_decoder(sizes, place.device).eval()
        inputs = stored_features(sizes, batch, place.device)
        reference = gradients_of(PlainHead(head).double(), decoded(inputs, torch.float64))
        with tf32(precision == "tf32"), place.autocast(precision), by_path(path):
            ours = gradients_of(head, inputs)
        with tf32(precision == "tf32"), place.autocast(precision):
            twin = gradients_of(PlainHead(head), decoded(inputs, torch.float32))
        found = {}
        for what in ("logits", "gradients"):
            error, of = worst_error(ours, reference, what)
            usual, _ = worst_error(twin, reference, what)
            found[what] = {"ours": float(f"{error:.2e}"), "twin": float(f"{usual:.2e}"), "worst": of}
            if not error <= max(ROUNDING[precision], _TIMES_THE_TWIN * usual):
                wrong.append(f"{name}: {what} of {of} err by {error:.2e}, those of the twin by {usual:.2e}")
        yield {name: found}
    assert not wrong, "; ".join(wrong)


def gradients_of(head: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Logits, and the gradients of a weighted sum of them, by name; one of another device or dtype is an error."""
    parameters = dict(head.named_parameters())
    logits = head(*inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    with torch.autocast(logits.device.type, enabled=False):
        (logits * weights).sum().backward()
    found = {"logits": logits.detach()}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        assert parameter.grad.device == parameter.device and parameter.grad.dtype == parameter.dtype, name
        found[name] = parameter.grad
        parameter.grad = None
    return found


def worst_error(found: dict[str, Tensor], reference: dict[str, Tensor], what: str) -> tuple[float, str]:
    """The largest relative error of logits or of a gradient, and whose it is."""
    names = ["logits"] if what == "logits" else [name for name in reference if name != "logits"]
    norms = {name: float(reference[name].norm()) for name in names}
    errors = {
        name: float((found[name].double() - reference[name]).norm()) / norms[name]
        for name in names
        if norms[name] > _SMALL * max(norms.values())
    }
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def heads_train(place: Place, precision: str) -> Iterator[Values]:
    """A training step of every head there is, from codes: parameters stay finite, and on their device."""
    if precision == "bfloat16" and not place.has_bfloat16:
        raise Skipped("the card computes bfloat16 slowly")
    from evl_cache.train.batch_size import training_step
    from evl_cache.train.options import TrainOptions

    depth = max(kind.default_depth or 2 for kind in HEADS.values())
    sizes = replace(place.sizes, layers=depth, classes=5)
    features = stored_batch(sizes, 3, place.device)
    options = TrainOptions(steps=1, batch=4, precision=precision, device=place.device)
    for name in HEADS:
        head = new_head(name, sizes)
        training_step(head, features_for(head, features), options, batch=4)
        for parameter, value in head.named_parameters():
            assert value.device.type == torch.device(place.device).type, (
                f"{name}: {parameter} is on {value.device}"
            )
            assert bool(value.isfinite().all()), f"{name}: {parameter} is not finite after a step"
    yield {"heads": list(HEADS)}


def stored_batch(sizes: Sizes, batch: int, device: str) -> StoredBatch:
    """Features as a loader gives them, class tokens too."""
    from evl_cache.store import StoredBatch

    tokens, maps = stored_features(sizes, batch, device)
    class_tokens = [
        torch.randn(batch, sizes.frames, 1, sizes.width, device=device).half() for _ in range(sizes.layers)
    ]
    return StoredBatch(tokens=list(tokens), maps=list(maps), class_tokens=class_tokens)


def new_head(name: str, sizes: Sizes) -> Head:
    """A head by its name in `HEADS`, of as many layers as suit it."""
    depth = HEADS[name].default_depth or min(2, sizes.layers)
    return build_head(
        name.replace("N", str(depth)),
        num_layers=depth,
        width=sizes.width,
        num_frames=sizes.frames,
        grid=sizes.grid,
        num_classes=sizes.classes,
        num_heads=sizes.heads,
    )


def features_for(head: Head, features: StoredBatch) -> StoredBatch:
    """What a head reads: as many of the last layers as it has, and their maps where it reads maps."""
    from evl_cache.store import StoredBatch

    last = slice(-head.num_layers, None)
    return StoredBatch(
        tokens=features.tokens[last],
        maps=None if features.maps is None or not head.reads_maps else features.maps[last],
        class_tokens=None if features.class_tokens is None else features.class_tokens[last],
    )


def maps_made_again(place: Place) -> Iterator[Values]:
    """Maps from stored tokens, on the device, against the definition computed in float64 on the CPU."""
    from evl_cache.store.format.recomputed import ProjectionOnDevices, RecomputedMaps

    sizes = replace(place.sizes, layers=1)
    stored = stored_features(sizes, 3, place.device)[0][0]
    assert isinstance(stored, QuantizedTokens)
    projection = random_projection(sizes)
    made = RecomputedMaps(below=stored, projection=ProjectionOnDevices(projection)).made()
    assert made.device.type == torch.device(place.device).type and made.dtype == torch.float32, made.dtype
    assert stored.scale is not None
    tokens = dequantize_tokens(stored.codes.cpu(), stored.affine.cpu(), stored.scale.cpu()).double()
    expected = plain_maps(tokens, projection)
    error = float((made.cpu().double() - expected).norm() / expected.norm())
    yield {"relative_error": float(f"{error:.2e}")}
    assert error < 1e-3, f"maps err by {error:.2e}"


def random_projection(sizes: Sizes) -> MapProjection:
    """What makes queries and keys, drawn at random."""
    generator = torch.Generator().manual_seed(3)
    C = sizes.width
    return MapProjection(
        norm_weight=1 + 0.1 * torch.randn(C, generator=generator),
        norm_bias=0.1 * torch.randn(C, generator=generator),
        norm_eps=1e-5,
        weight=(torch.randn(2 * C, C, generator=generator) * C**-0.5).half(),
        bias=0.1 * torch.randn(2 * C, generator=generator),
        num_heads=sizes.heads,
    )


def plain_maps(tokens: Tensor, projection: MapProjection) -> Tensor:
    """Maps (B, 2, T-1, P, P) of tokens (B, T, N, C), all in float64."""
    norm = torch.nn.functional.layer_norm(
        tokens,
        tokens.shape[-1:],
        projection.norm_weight.double(),
        projection.norm_bias.double(),
        projection.norm_eps,
    )
    qk = torch.nn.functional.linear(norm, projection.weight.double(), projection.bias.double())
    q, k = qk.view(*qk.shape[:3], 2, projection.num_heads, -1).unbind(3)
    return adjacent_frame_maps(q, k)


def all_paths(place: Place) -> list[str | None]:
    """The paths that a step is compared by: every one there is, or the only one."""
    return [*known_paths(place)] or [None]
