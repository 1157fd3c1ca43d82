"""Which package serves as `decord`: decord2, the fork that is kept up, or decord itself. Both are imported by that name."""

import importlib.metadata
import importlib.util
from pathlib import Path

_PACKAGES = ("decord2", "decord")


def has_decord() -> bool:
    """Whether one of the packages is installed."""
    return importlib.util.find_spec("decord") is not None


def decord_package() -> str:
    """Return the name of the package whose decord was imported.

    Where both are installed, the later one has overwritten the other's files: the version that the module claims tells
    which. A module that no installed package explains is called `decord`.
    """
    import decord

    for name in _PACKAGES:
        try:
            if importlib.metadata.version(name) == decord.__version__:
                return name
        except importlib.metadata.PackageNotFoundError:
            continue
    return "decord"


def decord_and_version() -> str:
    """Return what a clip's record calls it: `decord2 3.4.0`, or `decord 0.6.0`."""
    import decord

    return f"{decord_package()} {decord.__version__}"


def decord_libraries(name: str) -> list[Path]:
    """Return the files of a library that came with it, such as `libavutil`; none but on Linux, where wheels keep them aside."""
    import decord

    beside = Path(decord.__file__).parent.parent / f"{decord_package()}.libs"
    return sorted(beside.glob(f"{name}*"))
