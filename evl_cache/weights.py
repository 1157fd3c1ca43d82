"""Weight files of image towers, read as data: safetensors, state dicts, OpenAI's TorchScript archives."""

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evl_cache.errors import WeightsError

_WRAPPERS = ("state_dict", "model", "module")


@dataclass(frozen=True, kw_only=True)
class TowerWeights:
    """The image tower's part of a weights file.

    Attributes:
        tensors: float32 by name, without the `visual.` prefix.
        is_openai_archive: the file is a TorchScript archive as published by OpenAI, whose towers use
            QuickGELU.
    """

    tensors: dict[str, torch.Tensor]
    is_openai_archive: bool


def read_tower_weights(path: Path) -> TowerWeights:
    """Read the image tower's weights from a file of any of the three kinds.

    Raises: WeightsError where the file is none of them.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; give a file or a pretrained tag")
    is_archive = _is_torchscript(path)
    state = _read(path, is_archive)
    plain: dict[str, Any] = {name.removeprefix("module."): value for name, value in state.items()}
    visual = {n.removeprefix("visual."): v for n, v in plain.items() if n.startswith("visual.")} or plain
    tensors = {n: v.to(torch.float32) for n, v in visual.items() if torch.is_tensor(v)}
    if "conv1.weight" not in tensors:
        raise WeightsError(
            f"{path}: holds no image tower ('visual.conv1.weight' is missing); expected weights of an "
            "open_clip or OpenAI CLIP VisionTransformer"
        )
    return TowerWeights(tensors=tensors, is_openai_archive=is_archive)


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, shapes and float32 values: equal for the same weights in whatever kind of file."""
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


def _read_torchscript(path: Path) -> Mapping[str, torch.Tensor]:
    with warnings.catch_warnings():
        # Newer torch deprecates TorchScript; OpenAI's files are what they are, and users can do nothing about it.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.load.* is deprecated")
        state: Mapping[str, torch.Tensor] = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    return state


def _read(path: Path, is_torchscript: bool) -> Mapping[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_torchscript:
            return _read_torchscript(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path}: cannot be read as weights ({reason}); expected safetensors, a state dict of tensors "
            "(torch.save) or OpenAI's TorchScript archive"
        ) from error
    except Exception as error:  # safetensors raises its own class, which it exports under a private name
        if type(error).__module__.startswith("safetensors"):
            raise WeightsError(f"{path}: not a valid safetensors file ({error})") from error
        raise
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}; expected a state dict of tensors")
    return content
