"""A user whom permissions stop, also where the tests run as root."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_NOBODY = 65534


@contextlib.contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    """Close a file or directory, and be a user whom its mode stops: root's group may look into all directories above it."""
    modes = {place: place.stat().st_mode for place in (path, *path.parents)}
    user = os.geteuid()
    path.chmod(mode)
    if user == 0:
        for above in path.parents:
            above.chmod(modes[above] | 0o050)
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
            for above in path.parents:
                above.chmod(modes[above])
        path.chmod(modes[path])
