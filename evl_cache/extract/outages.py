"""Bad file or bad world: what fails a clip, and what is waited for because no clip is to blame.

A file that cannot be decoded is the clip's own fault, and is recorded. A disk that is away, a file that may not be read,
want of descriptors or memory is not: the clip is tried again until its surroundings are in order, and where they stay out
of order the run stops, and records nothing.
"""

import errno
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from evl_cache.errors import NO_SUCH_FILE, ClipError, Outage
from evl_cache.standstill import Standstill

OUTAGE_PATIENCE_S = 600.0
UNREAD_PATIENCE_S = 10.0  # before any clip was read: rather a wrong folder, or a disk that nobody has mounted
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_MOST_FOLDERS = 10_000  # that are remembered
_BACK = "bring the disk back"
_BACK_OR_EMPTY = "bring the disk back, or use --allow-missing if nothing is to be there"
_AWAY = "bring the disk back, or move the file away and use --allow-missing if it alone is at fault"
_CLOSED = "make it readable (chmod), or move it away and use --allow-missing"

OnOutage = Callable[[str], None]
ResultT = TypeVar("ResultT")
_Look = tuple[
    int, int, int, int, int
]  # disk, file, bytes, and when its content and its entry last changed, in ns
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system


class Surroundings:
    """The disks, mounts and limits that clips are read through, shared by all threads of a run. `close` it.

    Args:
        root: folder of the videos.
        patience_s: how long an outage is waited for; 0 for not at all. None: `OUTAGE_PATIENCE_S`, and before any clip was
            read `UNREAD_PATIENCE_S`, so that whoever sits there hears soon of a folder that is not there.
        on_outage: called with a line when an outage begins, and with one when it is over, from any thread.
    """

    def __init__(
        self, root: Path, *, patience_s: float | None = 0.0, on_outage: OnOutage = lambda message: None
    ) -> None:
        self._root, self._on_outage = root, on_outage
        self._patience_s = UNREAD_PATIENCE_S if patience_s is None else patience_s
        self._patience_once_read_s = OUTAGE_PATIENCE_S if patience_s is None else patience_s
        # Folders that clips were read from, and the disk that each was on. Another mount may have other numbers after a
        # return: what was read last counts.
        self._known: dict[Path, int | None] = {root: None}
        with suppress(Outage):  # the first clip will tell
            self._known[root] = _device(root)
        self._hashed: dict[Path, tuple[_Look, tuple[int, str]]] = {}
        self._hashing: dict[Path, threading.Lock] = {}
        self._changed = threading.Condition()
        self._waiting, self._began_s = 0, 0.0
        self._over: Outage | None = None  # patience is: nobody waits any longer

    def patiently(self, attempt: Callable[[], ResultT]) -> ResultT:
        """Return what `attempt` returns; where it meets an outage, try again, with pauses that grow.

        Raises: Outage where it lasts longer than patience, or the run is closed.
        """
        began_s: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = attempt()
                break
            except Outage as outage:
                if began_s is None:
                    began_s = time.monotonic()
                    self._join(outage)
                began_s += self._wait(outage, time.monotonic() - began_s, pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if began_s is not None:
            self._leave()
        return result

    def _join(self, outage: Outage) -> None:
        with self._changed:
            self._waiting += 1
            if self._waiting > 1 or self._patience_s <= 0 or self._over is not None:
                return
            self._began_s = time.monotonic()
        self._on_outage(
            f"{outage.trouble}; no clip's fault: tried again for up to {self._patience_s:g} s ({outage.remedy})"
        )

    def _wait(self, outage: Outage, waited_s: float, pause_s: float) -> float:
        """Wait before the next attempt; return for how long this process stood still. Raises: Outage where none is to be."""
        standstill, stood_s, is_told = Standstill(), 0.0, False
        with self._changed:
            if self._over is None and waited_s < self._patience_s:
                left_s = min(pause_s, self._patience_s - waited_s)
                while left_s > 0 and not is_told:
                    step_s = min(left_s, 1.0)
                    is_told = self._changed.wait(step_s)
                    stood_s += standstill.look(step_s)
                    left_s -= step_s
            elif self._over is None:
                self._over = outage if self._patience_s <= 0 else _lasting(outage, waited_s)
                self._changed.notify_all()
            if self._over is not None:
                raise self._over
        return stood_s

    def _leave(self) -> None:
        with self._changed:
            self._waiting -= 1
            self._changed.notify_all()  # what is back for one may be back for all
            if self._waiting > 0 or self._over is not None:
                return
            lasted_s = time.monotonic() - self._began_s
        self._on_outage(f"the outage is over after {lasted_s:.0f} s; going on")

    def close(self) -> None:
        """End every wait at once."""
        with self._changed:
            self._over = self._over or Outage("the run was stopped", remedy="run the same command again")
            self._changed.notify_all()

    def hash_file(self, path: Path, *, may_be_missing: bool = False) -> tuple[int, str]:
        """Return size and sha256 of a clip's file.

        Args:
            may_be_missing: it was missing before the run began, and that was allowed.

        Raises: ClipError for a file that is not there, or none; Outage where it cannot be read for another reason.
        """
        try:
            folders = self._folders_of(path)
            found = sha256_of(path)
        except OSError as error:
            if error.errno not in NO_SUCH_FILE:
                raise _outage(path, error) from error
            if not may_be_missing:
                self._check_absent(path)
            raise ClipError(f"{path}: cannot be opened ({error.strerror})") from error
        except ValueError as error:
            raise ClipError(f"{str(path)!r}: cannot be opened (no file has such a name)") from error
        self._patience_s = self._patience_once_read_s
        if len(self._known) < _MOST_FOLDERS:
            # A mount that is gone may be the folder of a folder. Which disk those above are on was not asked.
            for above in {parent for folder in folders for parent in folder.parents}:
                self._known.setdefault(above, None)
            self._known |= folders
        return found

    def hash_once(self, path: Path, *, may_be_missing: bool = False) -> tuple[int, str]:
        """As `hash_file`, of a file that many clips are of: it is read again where a look at it shows another, or a later one.

        What changed a moment ago is not remembered: it may change again within one tick of its disk's clock.
        """
        with self._changed:
            one_at_a_time = self._hashing.setdefault(path, threading.Lock())
        with one_at_a_time:
            before = _look(path)
            found, known = self._hashed.get(path, (None, None))
            if known is not None and found == before:
                return known
            known = self.hash_file(path, may_be_missing=may_be_missing)
            if (
                before is not None
                and before == _look(path)
                and time.time_ns() - max(before[3:]) > _SETTLED_NS
            ):
                self._hashed[path] = before, known
            return known

    def check_unchanged(self, path: Path, source: tuple[int, str]) -> None:
        """Read a clip's file again, of which a decoder complained. Raises: Outage where it is not what it was."""
        try:
            same = self.hash_file(path) == source
        except ClipError:
            same = False
        if not same:
            self._hashed.pop(path, None)
            raise Outage(
                f"{path}: changes while it is read", remedy="wait until nothing writes to the videos any more"
            )

    def _folders_of(self, path: Path) -> Mapping[Path, int | None]:
        """The folders that a file is found through, by the disk that each is on now, before the file is read."""
        folders = {path.parent, Path(os.path.realpath(path)).parent}
        if self._root in path.parents:
            folders.add(self._root)
        return {folder: device for folder in folders if (device := _device(folder)) is not None}

    def _check_absent(self, path: Path) -> None:
        """Check that a file is not there while all around it is. Raises: Outage where its disk may be away."""
        self._check_folders(path)
        try:
            path.stat()
        except OSError as error:
            if error.errno not in NO_SUCH_FILE:
                raise _outage(path, error) from error
            self._check_folders(path)
            return
        raise Outage(f"{path}: was away for a moment", remedy=_BACK)

    def _check_folders(self, path: Path) -> None:
        """Raises: Outage where a folder of this file is away, empty, or on another disk than when a clip was read."""
        known = dict(self._known)
        for place in {path, Path(os.path.realpath(path))}:
            nearest: Path | None = None
            for folder in place.parents:
                device = _device(folder)
                if device is None and folder in known:
                    raise Outage(f"{folder}: is not there, as where a disk is away", remedy=_BACK)
                if known.get(folder, device) not in (device, None):
                    raise Outage(f"{folder}: is on another disk than before", remedy=_BACK)
                if nearest is None and device is not None:
                    nearest = folder
            if nearest is not None and _is_empty(nearest):
                raise Outage(f"{nearest}: is empty, as where a disk is away", remedy=_BACK_OR_EMPTY)


def sha256_of(path: Path) -> tuple[int, str]:
    """Return size and sha256 of a regular file. Raises: ClipError for another; OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ClipError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), found


def _look(path: Path) -> _Look | None:
    """What tells a file from another without reading it; None where it cannot be looked at."""
    try:
        at = path.stat()
    except (OSError, ValueError):
        return None
    return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def _lasting(outage: Outage, waited_s: float) -> Outage:
    """The error that ends a run."""
    return Outage(
        f"{outage.trouble}, still after {waited_s:.0f} s; no clip was recorded as failed for it",
        remedy=f"{outage.remedy}; then run the same command again, and it goes on",
    )


def _outage(path: Path, error: OSError) -> Outage:
    is_closed = error.errno in (errno.EACCES, errno.EPERM)
    return Outage.of(f"{path}: cannot be read", error, remedy=_CLOSED if is_closed else _AWAY)


def _device(folder: Path) -> int | None:
    """The disk that a folder is on; None where there is no such folder. Raises: Outage where nobody can say."""
    try:
        found = folder.stat()
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return None
        raise _outage(folder, error) from error
    return found.st_dev if stat.S_ISDIR(found.st_mode) else None


def _is_empty(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except PermissionError:  # files in it may be read all the same
        return False
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return True
        raise _outage(folder, error) from error
