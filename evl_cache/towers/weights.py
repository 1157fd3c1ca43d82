"""Read image towers' weights: safetensors, state dicts and OpenAI's TorchScript archives."""

import hashlib
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evl_cache.errors import WeightsError, first_line

# Names of the patch embedding in open_clip's own tower, in a timm trunk of open_clip's, and in timm's own models.
_STEMS = ("conv1.weight", "trunk.patch_embed.proj.weight", "patch_embed.proj.weight", "patch_embed.weight")
_WRAPPERS = ("state_dict", "model", "module")


@dataclass(frozen=True, kw_only=True)
class TowerWeights:
    """The image tower's part of a weights file.

    Attributes:
        tensors: float32 by name, without the `visual.` prefix.
        is_openai_archive: whether the file is a TorchScript archive as OpenAI publishes it; those towers use QuickGELU.
    """

    tensors: dict[str, torch.Tensor]
    is_openai_archive: bool


def read_tower_weights(path: Path) -> TowerWeights:
    """Return the image tower's weights of a file of any of the three kinds.

    Raises: WeightsError where the file is of no such kind.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; give a file or a pretrained tag")
    is_archive = _is_torchscript(path)
    state = _read(path, is_archive)
    plain: dict[str, Any] = {str(name).removeprefix("module."): value for name, value in state.items()}
    visual = {n.removeprefix("visual."): v for n, v in plain.items() if n.startswith("visual.")} or plain
    tensors = {n: v.to(torch.float32) for n, v in visual.items() if torch.is_tensor(v)}
    if not any(stem in tensors for stem in _STEMS):
        raise WeightsError(
            f"{path}: holds no image tower ('visual.conv1.weight' is missing); expected weights of an "
            "open_clip, OpenAI CLIP or timm vision transformer"
        )
    return TowerWeights(tensors=tensors, is_openai_archive=is_archive)


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of names, shapes and float32 values, the same for every kind of file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(value.shape)};".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _read(path: Path, is_torchscript: bool) -> Mapping[str, torch.Tensor]:
    try:
        content = _load(path, is_torchscript)
    except Exception as error:  # what torch, pickle and safetensors raise for a damaged file is open-ended
        raise WeightsError(
            f"{path}: cannot be read as weights ({first_line(error)[:200]}); expected safetensors, a state dict of tensors "
            "(torch.save) or OpenAI's TorchScript archive"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path}: holds a {type(content).__name__}; expected a state dict of tensors (torch.save)"
        )
    return content


def _load(path: Path, is_torchscript: bool) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        # Warnings about the files' formats, which users cannot change.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.load.* is deprecated")
        warnings.filterwarnings("ignore", message=r"Detected pickle protocol")
        if is_torchscript:
            return torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        return torch.load(path, map_location="cpu", weights_only=True)
