"""Load weights into a tower: find the one prefix under which all its names fit, and say what was found."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from evl_cache.errors import WeightsError
from evl_cache.notation import escaped
from evl_cache.towers.several_towers import told_of_several
from evl_cache.towers.weights import Candidate, TowerWeights, beside, extra, tensors_sha256

Tensors = Mapping[str, torch.Tensor]
_log = logging.getLogger("evl_cache")


def load_weights(
    visual: nn.Module,
    weights: TowerWeights,
    *,
    model: str,
    pretrained: str,
    convert: Callable[[Tensors], Tensors] | None = None,
) -> None:
    """Load weights into a tower; say on stderr behind which prefix they were, and what was left out.

    Args:
        convert: from the authors' names to the tower's, where these are not in the file. It raises a WeightsError.

    Raises: WeightsError where a name or a shape does not match, or two sets of weights do.
    """
    own = visual.state_dict()
    chosen = _chosen(weights, own, pretrained, convert)
    left_out = beside(chosen.tensors, own)
    tensors = {n: v.to(torch.float32) for n, v in chosen.tensors.items() if n not in left_out}
    _check(tensors, own, chosen, model=model, pretrained=pretrained)
    visual.load_state_dict(tensors)
    if not chosen.is_plain:
        _log.warning("%s", escaped(f"weights {pretrained!r}: the tower is read from {chosen}"))
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        named = ", ".join(left_out[:3])
        _log.warning(
            "%s",
            escaped(f"weights {pretrained!r}: left out {named}{more}: no part of the image tower {model}"),
        )


def _chosen(
    weights: TowerWeights, own: Tensors, pretrained: str, convert: Callable[[Tensors], Tensors] | None
) -> Candidate:
    """Return the tensors that fit, or else the likeliest. Raises: WeightsError where there are none, or two."""
    candidates = weights.candidates(own)
    likeliest = [each for each in candidates if each.is_image_tower or 2 * each.found > len(own)]
    if not likeliest:
        raise WeightsError(
            f"{weights.path}: holds no image tower ('visual.conv1.weight' is missing); expected weights of an "
            "open_clip, OpenAI CLIP or timm vision transformer"
        )
    for each in likeliest:
        _refuse_without_values(each, weights)
    fitting = [each for each in likeliest if each.fits(own)]
    if convert is not None:
        converted, refused = _converted([each for each in likeliest if not each.fits(own)], convert)
        if not fitting and not converted:
            raise refused[0]
        likeliest = (
            fitting + converted
        )  # beside a tower with names of its own, another by its authors' is a second one
        fitting = [each for each in likeliest if each.fits(own)]
    # Of equal ones, one that has no other names beside it; whether they are equal does not depend on those.
    fitting.sort(key=lambda each: bool(extra(each.tensors, own)))
    if len(differing := _differing(fitting, own)) > 1:
        raise WeightsError(told_of_several(weights.path, differing, own, pretrained))
    return fitting[0] if fitting else likeliest[0]


def _refuse_without_values(candidate: Candidate, weights: TowerWeights) -> None:
    """Raise a WeightsError for tensors that are not the plain numbers which a tower has."""
    for name, tensor in candidate.tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
            kind = (
                "without values (device 'meta')" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            ).replace("torch.", "")
            raise WeightsError(
                f"{weights.path}: {escaped(name)[:200]} is a tensor {kind}; expected plain real numbers: save the weights "
                "when they are loaded, and dense"
            )


def _differing(fitting: list[Candidate], own: Tensors) -> list[Candidate]:
    """Return the first of each set of candidates whose tensors are the same."""
    if len(fitting) < 2:
        return fitting
    firsts: dict[str, Candidate] = {}
    for each in fitting:
        firsts.setdefault(tensors_sha256({n: each.tensors[n] for n in own}), each)
    return list(firsts.values())


def _converted(
    candidates: list[Candidate], convert: Callable[[Tensors], Tensors]
) -> tuple[list[Candidate], list[WeightsError]]:
    """Return candidates with the tower's names, and why others cannot be converted."""
    converted: list[Candidate] = []
    refused: list[WeightsError] = []
    for each in candidates:
        try:
            converted.append(replace(each, tensors=convert(each.tensors)))
        except WeightsError as error:
            refused.append(error)
    return converted, refused


def _check(tensors: Tensors, own: Tensors, chosen: Candidate, *, model: str, pretrained: str) -> None:
    """Raise a WeightsError where tensors are not those of a tower."""
    wrong = [n for n in own if n in tensors and tensors[n].shape != own[n].shape]
    missing = [name for name in own if name not in tensors]
    others = extra(tensors, own)
    if not (wrong or missing or others):
        return
    first = (
        f"{wrong[0]} is {tuple(tensors[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        if wrong
        else f"missing {missing[:2]}, not in the model {others[:2]}"
    )
    where = "" if chosen.is_plain else f" (read from {chosen})"
    remedy = "choose the --model they were trained for"
    if missing and not wrong and not others and 2 * len(missing) < len(own):
        remedy += ", or save its whole state dict"
    raise WeightsError(
        f"weights {pretrained!r} do not match model {model}{where}: {first} ({len(wrong)} shapes, {len(missing)} "
        f"missing, {len(others)} extra); {remedy}"
    )
