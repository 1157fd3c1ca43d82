"""Permissions of a cache's files: caches are made to be shared, so the group may read unless a mode is given."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_GROUP_READ, _GROUP_SEARCH = 0o040, 0o050


@dataclass
class _Modes:
    """Permissions of new files and directories; None: those of the umask, and readable by the group."""

    file: int | None = None
    directory: int | None = None


_modes = _Modes()


def set_file_mode(mode: int | None) -> None:
    """Set the permissions of every file that this process makes in caches, such as 0o600; None: the default.

    Directories get the same, and search permission for whoever may read.
    """
    _modes.file = mode
    _modes.directory = None if mode is None else mode | 0o300 | (mode & 0o444) >> 2


def give_file_mode(made: int) -> None:
    """Give an open file that was just made its permissions."""
    _give(made, _modes.file, _GROUP_READ)


def give_directory_mode(made: Path) -> None:
    """Give a directory that was just made its permissions."""
    _give(made, _modes.directory, _GROUP_SEARCH)


def _give(made: int | Path, mode: int | None, at_least: int) -> None:
    with contextlib.suppress(PermissionError, NotImplementedError):  # file systems without permissions
        os.chmod(made, os.stat(made).st_mode & 0o7777 | at_least if mode is None else mode)
