"""Check files of tensors and settings that may come from strangers, before they are loaded.

`weights_only` and safetensors keep code out. The checks here keep a file from making this process allocate memory for
more than the file holds.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from evl_cache.errors import WeightsError
from evl_cache.untrusted.json_text import parse_json

MOST_JSON_NBYTES = 16 << 20
_MOST_EXPANSION = 4  # largest growth of a zip archive when it is unpacked; torch.save does not compress
# Largest values of a head's arguments.
_MOST = {"num_frames": 4096, "num_classes": 10**6, "num_layers": 1024, "num_heads": 65536}
_MOST_WIDTH = 1 << 20
_SIZES = ("num_layers", "width", "num_frames", "num_classes")  # every head has these, and its grid


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises: OSError where the file cannot be read; ValueError where it holds something else or is too large.
    """
    if not path.is_file():  # a pipe might never end; a missing file raises in `stat`
        path.stat()
        raise ValueError("not a regular file")
    if path.stat().st_size > MOST_JSON_NBYTES:
        raise ValueError(f"has {path.stat().st_size} bytes, expected at most {MOST_JSON_NBYTES}")
    content = parse_json(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected an object")
    return content


def check_head_config(config: Mapping[str, Any]) -> None:
    """Check the arguments of a head before it is built. Raises: ValueError naming the one that is wrong."""
    for name in _SIZES:
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} is {str(config[name])[:40]!r}, expected a number from 1 on")
    grid = config["grid"]
    if not isinstance(grid, list | tuple) or len(grid) != 2 or not all(isinstance(n, int) for n in grid):
        raise ValueError(f"grid is {str(grid)[:40]!r}, expected rows and columns of patches")
    for name, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        for number in values:
            if isinstance(number, int) and not isinstance(number, bool):
                most = _MOST.get(name, _MOST_WIDTH)
                if not 0 <= number <= most:
                    raise ValueError(f"{name} is {number}, expected 0 to {most}")
            elif not isinstance(number, float | bool | str | None):
                raise ValueError(f"{name} is {str(number)[:40]!r}, expected numbers")


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors without reading them.

    Raises: WeightsError where it is no safetensors file.
    """
    try:
        if not path.is_file():
            path.stat()
            raise OSError("not a regular file")
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error}); is the run finished?") from error
    except Exception as error:  # safetensors' own error class is not part of its public interface
        raise WeightsError(f"{path}: not a valid safetensors file ({error})") from error


def check_archive(path: Path) -> None:
    """Check a file for `torch.load`. Raises: ValueError for a zip archive that is much larger when unpacked."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > _MOST_EXPANSION * os.path.getsize(path):
        raise ValueError(f"its {os.path.getsize(path)} bytes would unpack to {claimed}")


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that each tensor of a file has as many values as its shape says. Raises: ValueError naming one that has not."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"{name} is no plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} shows {tuple(tensor.shape)}, more values than it has")
