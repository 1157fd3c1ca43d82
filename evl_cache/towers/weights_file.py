"""Read weights files: safetensors, state dicts and OpenAI's TorchScript archives. No code in a file is run."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evl_cache.errors import WeightsError, is_want_of_memory, told_of_memory

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # how torch names the object that it does not read
# What training scripts save beside the tensors, and what says nothing about them. Whatever a file says of such an object
# is passed over, unread: numpy's own readers would trust it.
_PASSED_OVER = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"pathlib._local.{kind}" for kind in ("Path", "PosixPath", "WindowsPath")),
    *(f"datetime.{kind}" for kind in ("datetime", "date", "timedelta")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{kind}{bits}DType" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    *(f"numpy.dtypes.Float{bits}DType" for bits in (16, 32, 64)),
)
_LONGEST_GLOBAL = 80  # characters of that name
# A TorchScript archive is read without its code being run, except for methods of this name.
_RUN_ON_LOADING = b"__setstate__"
_MOST_SOURCE = 64 * 2**20  # bytes of source in such an archive; a traced ViT-B has 0.1 MB
_HOW_TO_SAVE = "save the state dict alone: torch.save(model.state_dict(), FILE)"


class _HasCode(Exception):
    """Reading a TorchScript archive would run what is in it."""


class _PassedOver:
    """What stands for an object beside the tensors: it takes whatever a file says of it, and keeps nothing."""

    def __new__(cls, *values: object) -> "_PassedOver":
        """Return one that holds nothing of these values."""
        return super().__new__(cls)

    def __init__(self, *values: object) -> None:
        """Keep nothing."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def read_weights_file(path: Path) -> tuple[Mapping[Any, Any], bool]:
    """Return what a weights file holds, and whether it is a TorchScript archive as OpenAI publishes them.

    Raises: WeightsError where the file is of no kind that is read.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; give a file or a pretrained tag")
    try:
        is_archive = _is_torchscript(path)
        content = _load(path, is_archive)
    except Exception as error:  # what torch, pickle and safetensors raise for a damaged file is open-ended
        raise WeightsError(f"{path}: cannot be read as weights: {_why(path, error)}") from error
    if not isinstance(content, Mapping):
        kind = "other things" if isinstance(content, _PassedOver) else f"a {type(content).__name__}"
        raise WeightsError(f"{path}: holds {kind}; expected a state dict of tensors (torch.save)")
    return content, is_archive


def _why(path: Path, error: Exception) -> str:
    """Return why a file cannot be read, and what to do: never torch's own words, which advise to run what is in it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; expected a file that may be read"
    if is_want_of_memory(error):
        return f"{told_of_memory(error)}, or it is damaged; free some memory"
    other = _GLOBAL.search(str(error))
    if other or isinstance(error, _HasCode):
        what = other[1] if other else str(error)
        shown = what if len(what) <= _LONGEST_GLOBAL else f"{what[:_LONGEST_GLOBAL]}…"
        return (
            f"it holds more than tensors ({shown}), and code in weights files is not run; where you trust it, read it "
            f"with torch and {_HOW_TO_SAVE}"
        )
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        found = "it is a pointer of Git LFS, not the file (git lfs pull fetches it)"
    elif start.startswith((b"<!doctype", b"<html")):
        found = "it is a web page; download the file itself"
    else:
        found = "it is empty" if not start else "it is damaged, cut short, or of another kind"
    return (
        f"{found}; expected safetensors, a state dict of tensors (torch.save) or OpenAI's TorchScript archive"
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _check_source(path: Path) -> None:
    """Check that reading a TorchScript archive runs nothing in it. OpenAI's were traced: they have methods to call, no others.

    Torch's own reader looks: another's idea of which entries a zip archive has may differ.

    Raises: _HasCode.
    """
    reader = torch._C.PyTorchFileReader(str(path))
    sources = [name for name in reader.get_all_records() if name.lower().endswith(".py")]
    if sum(map(reader.get_record_size, sources)) > _MOST_SOURCE:
        raise _HasCode(f"more than {_MOST_SOURCE // 2**20} MiB of source")
    for name in sources:
        if _RUN_ON_LOADING in reader.get_record(name):
            raise _HasCode(f"a method {_RUN_ON_LOADING.decode()}")


def _load(path: Path, is_torchscript: bool) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        # Warnings about the files' formats, which users cannot change.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.load.* is deprecated")
        warnings.filterwarnings("ignore", message=r"Detected pickle protocol")
        if is_torchscript:
            _check_source(path)
            return torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        with torch.serialization.safe_globals([(_PassedOver, name) for name in _PASSED_OVER]):
            return torch.load(path, map_location="cpu", weights_only=True)
