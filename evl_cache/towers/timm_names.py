"""timm's models by name: `timm/NAME`, `timm/NAME.TAG`, `timm/NAME@PIXELS`."""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evl_cache.errors import UsageError, WeightsError, first_line
from evl_cache.towers.families import adapter_of
from evl_cache.towers.loading import load_weights
from evl_cache.towers.names import TIMM_DEFAULT, TIMM_PREFIX, is_weights_file
from evl_cache.towers.pretrained import downloading
from evl_cache.towers.weights import read_tower_weights


def build_timm(model: str, pretrained: str, *, seed: int) -> tuple[nn.Module, dict[str, Any], str]:
    """Return a timm model without its classifier, its mean and standard deviation, and the name of its weights.

    Args:
        model: with @PIXELS for another image size than the weights' own, for which timm resamples positions.
        pretrained: tag of timm, `default` for the model's first tag, file, or `none`.
        seed: of random weights.

    Raises: as `build_tower` does.
    """
    import timm

    name, pixels, tag = _parse(model)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("*vit*") + timm.list_models("*eva*"), n=4)
        raise UsageError(
            f"unknown model {model!r}; timm has no {name}, expected a name such as {', '.join(near) or 'vit_base_patch16_224'}"
        )
    if pretrained == TIMM_DEFAULT:
        pretrained = tag or str(_told(name).tag or "none")
    is_file = is_weights_file(pretrained)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if pretrained != "none" and not is_file and pretrained not in tags:
        raise WeightsError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {model}; expected one of "
            f"{', '.join(tags) or '(no tags)'}, a file, or none"
        )
    visual = _random_model(name, pixels, seed, model)
    adapter_of(visual)  # raises before anything is downloaded
    full = name if is_file or pretrained == "none" else f"{name}.{pretrained}"
    if is_file:
        _load_file(visual, model, pretrained)
    elif pretrained != "none":
        with downloading(model, pretrained):
            visual = _create(full, pixels, pretrained=True)
    told = _told(full)
    return visual, {"mean": told.mean, "std": told.std}, Path(pretrained).name if is_file else pretrained


def _parse(model: str) -> tuple[str, int | None, str]:
    """Return name, pixels and tag of a model's full name. Raises: UsageError for what is no image size."""
    full, at, size = model.removeprefix(TIMM_PREFIX).partition("@")
    if at and not (size.isdecimal() and int(size) > 0):
        raise UsageError(f"model {model!r}: {size!r} is no image size; expected pixels, such as @224")
    name, _, tag = full.partition(".")
    return name, int(size) if at else None, tag


def _told(name: str) -> Any:
    """Return what timm records of a name, such as its tag, mean and std."""
    import timm

    return timm.get_pretrained_cfg(name)


def _create(name: str, pixels: int | None, **options: Any) -> nn.Module:
    import timm

    if pixels is not None:
        options["img_size"] = pixels
    created: nn.Module = timm.create_model(name, num_classes=0, **options)
    return created.eval()


def _random_model(name: str, pixels: int | None, seed: int, model: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _create(name, pixels, pretrained=False)
        except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
            raise UsageError(
                f"{model}: timm cannot build it ({first_line(error)}); choose another size or name"
            ) from error


def _load_file(visual: nn.Module, model: str, pretrained: str) -> None:
    """Load weights from a file with timm's names, or with the authors' names where timm converts them."""
    convert = getattr(sys.modules[type(visual).__module__], "checkpoint_filter_fn", None)

    def converted(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        full = {name: value.to(torch.float32) for name, value in tensors.items()}
        try:
            return full if convert is None else dict(convert(full, visual))
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise WeightsError(
                f"weights {pretrained!r} do not match model {model}: timm cannot convert them ({first_line(error)}); "
                "choose the --model they were trained for"
            ) from error

    load_weights(
        visual, read_tower_weights(Path(pretrained)), model=model, pretrained=pretrained, convert=converted
    )
