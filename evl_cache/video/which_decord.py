"""Which package serves as `decord`: decord2, the fork that is kept up, or decord itself. Both are imported by that name."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

_PACKAGES = ("decord2", "decord")
_loading = threading.Lock()


def has_decord() -> bool:
    """Whether one of the packages is installed, and not a folder that one of them left when it was uninstalled."""
    spec = importlib.util.find_spec("decord")
    return spec is not None and spec.origin is not None


def load_decord() -> Any:
    """Return the module decord, loaded so that its FFmpeg is its own.

    It loads itself for all libraries to find. decord2's FFmpeg may be of PyAV's version: what of PyAV is loaded later would
    then call decord2's, half of one library and half of the other, and hear what that one complains of in its place.
    """
    if "decord" in sys.modules:
        return importlib.import_module("decord")  # which waits for a thread that is still loading it
    with _loading:  # a second thread would take the first one's change for what is usual
        usual = ctypes.RTLD_GLOBAL
        ctypes.RTLD_GLOBAL = ctypes.RTLD_LOCAL  # type: ignore[misc]  # it asks for this one
        try:
            return importlib.import_module("decord")
        finally:
            ctypes.RTLD_GLOBAL = usual  # type: ignore[misc]


def decord_package() -> str:
    """Return the name of the package whose decord was imported.

    Where both are installed, the later one has overwritten the other's files: the version that the module claims tells
    which, and a package may add its build (`3.4.0+cu132`). A module that no package explains is called `decord`.
    """
    version = load_decord().__version__.partition("+")[0]
    for name in _PACKAGES:
        try:
            if importlib.metadata.version(name).partition("+")[0] == version:
                return name
        except importlib.metadata.PackageNotFoundError:
            continue
    return "decord"


def decord_and_version() -> str:
    """Return what a clip's record calls it: `decord2 3.4.0`, or `decord 0.6.0`."""
    return f"{decord_package()} {load_decord().__version__}"


def decord_libraries(name: str) -> list[Path]:
    """Return the files of a library that came with it, such as `libavutil`; none but on Linux, where wheels keep them aside."""
    beside = Path(load_decord().__file__).parent.parent / f"{decord_package()}.libs"
    return sorted(beside.glob(f"{name}*"))
