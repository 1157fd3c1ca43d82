"""Load weights into a tower: find the one prefix under which all its names fit, and say what was found."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from evl_cache.errors import WeightsError
from evl_cache.notation import escaped
from evl_cache.towers.weights import Candidate, TowerWeights, beside, tensors_sha256

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
    fitting = [each for each in likeliest if each.fits(own)]
    if not fitting and convert is not None:
        likeliest = _converted(likeliest, convert)
        fitting = [each for each in likeliest if each.fits(own)]
    fitting = [each for each in fitting if not _extra(each.tensors, own)] or fitting
    if len(fitting) > 1 and len({tensors_sha256({n: each.tensors[n] for n in own}) for each in fitting}) > 1:
        raise WeightsError(_several(weights, fitting, pretrained))
    return fitting[0] if fitting else likeliest[0]


def _converted(candidates: list[Candidate], convert: Callable[[Tensors], Tensors]) -> list[Candidate]:
    """Return candidates with the tower's names. Raises: WeightsError where none can be converted."""
    converted: list[Candidate] = []
    refused: list[WeightsError] = []
    for each in candidates:
        try:
            converted.append(replace(each, tensors=convert(each.tensors)))
        except WeightsError as error:
            refused.append(error)
    if not converted:
        raise refused[0]
    return converted


def _several(weights: TowerWeights, fitting: list[Candidate], pretrained: str) -> str:
    """Return what is said of several sets of weights in a file, and how one is chosen."""
    one, path = fitting[0], str(weights.path)
    inside = "".join(f"[{key!r}]" for key in one.container)
    names = f"{{n: v for n, v in s.items() if n.startswith({one.prefix!r})}}" if one.prefix else "s"
    return (
        f"weights {pretrained!r} hold {len(fitting)} towers that fit and differ: {' and '.join(map(str, fitting))}; save the "
        f"one you mean alone, as s = torch.load({path!r}, weights_only=True){inside}; torch.save({names}, 'one.pt')"
        " does for the first"
    )


def _extra(tensors: Tensors, own: Tensors) -> list[str]:
    left_out = set(beside(tensors, own))
    return [name for name in tensors if name not in own and name not in left_out]


def _check(tensors: Tensors, own: Tensors, chosen: Candidate, *, model: str, pretrained: str) -> None:
    """Raise a WeightsError where tensors are not those of a tower."""
    wrong = [n for n in own if n in tensors and tensors[n].shape != own[n].shape]
    missing = [name for name in own if name not in tensors]
    extra = _extra(tensors, own)
    if not (wrong or missing or extra):
        return
    first = (
        f"{wrong[0]} is {tuple(tensors[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        if wrong
        else f"missing {missing[:2]}, not in the model {extra[:2]}"
    )
    where = "" if chosen.is_plain else f" (read from {chosen})"
    remedy = "choose the --model they were trained for"
    if missing and not wrong and not extra and 2 * len(missing) < len(own):
        remedy += ", or save its whole state dict"
    raise WeightsError(
        f"weights {pretrained!r} do not match model {model}{where}: {first} ({len(wrong)} shapes, {len(missing)} "
        f"missing, {len(extra)} extra); {remedy}"
    )
