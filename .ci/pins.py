"""Print constraints.txt for this environment: its pins, but the torch and torchvision that are already there.

Run by `make setup` with the Python of the new environment. A torch that comes from outside the environment
(`--system-site-packages`) and is recent enough stays, since a second copy is gigabytes and may not fit the
driver; torchvision must then be that torch's own pair, so its pin goes too and pip finds the pair.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pip._vendor.packaging.version import Version

OLDEST_TORCH = Version("2.8")


def version_from_outside(name: str) -> str | None:
    """Version of a package that is visible but not installed in this environment itself."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    inside = Path(str(found.locate_file(""))).resolve().is_relative_to(Path(sys.prefix).resolve())
    return None if inside else found.version


def pins(constraints: str) -> str:
    """The constraints, with the pair of torch and torchvision that is there in place of the pinned pair."""
    torch = version_from_outside("torch")
    if torch is None or Version(torch) < OLDEST_TORCH:
        return constraints
    kept = [line for line in constraints.splitlines() if not re.match(r"torch(vision)?==", line)]
    vision = version_from_outside("torchvision")
    kept += [f"torch=={torch}"] + ([f"torchvision=={vision}"] if vision else [])
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    print(pins(Path("constraints.txt").read_text(encoding="utf-8")), end="")
