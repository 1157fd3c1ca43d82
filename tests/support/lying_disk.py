"""A disk that lies: a directory seen through FUSE, with switches for what network disks do to a program.

`lying_disk(backing, mount)` is the side of the tests: what lies in `backing` is also seen in `mount`, and the yielded
`LyingDisk` turns switches on and off while programs run there. As a script: the process that serves the mount.
Two mounts over one backing directory are two clients of one server.
"""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes.util import find_library
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_CAP_SYS_ADMIN = 21  # of Linux's capability.h
ROOT = Path(__file__).resolve().parents[2]
# What a fault can be put on; "any" stands for each of them. `release` is the last close, `flush` every one.
CALLS = "getattr readdir open create read write fsync flush release link unlink rename mkdir rmdir truncate chmod statfs"


@dataclass(frozen=True)
class Fault:
    """Calls that fail or are slow.

    Attributes:
        call: one of CALLS, or "any".
        error: errno, or 0 where the call is only slow.
        at: the first call it hits, counted from 1 since `set`.
        times: how many calls from there; None: all.
        under: only paths below this one, relative to the mount.
        sleep_s: wait before.
    """

    call: str
    error: int = 0
    at: int = 1
    times: int | None = 1
    under: str = ""
    sleep_s: float = 0.0


NO_HARD_LINKS = Fault("link", errno.EPERM, times=None)
SLOW_CLOSE = Fault("flush", sleep_s=0.005, times=None)


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What the disk does.

    Attributes:
        faults: see `Fault`.
        silly_rename: a file that is open and loses its name gets the name `.nfs…`, as on NFS: it is seen in the
            directory until its last close, and cannot be removed (EBUSY). Off: it is not seen any more.
        stale: a file that another process removed or replaced gives ESTALE to whoever has it open.
        no_mmap: files cannot be mapped.
        ignores_case: names that differ only in case are one name.
    """

    faults: tuple[Fault, ...] = ()
    silly_rename: bool = False
    stale: bool = False
    no_mmap: bool = False
    ignores_case: bool = False


def why_not() -> str | None:
    """Why there can be no lying disk here; None where there can."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if not _may_mount():
        return "mounting needs root, and in a container CAP_SYS_ADMIN"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is not installed: pip install 'evl-cache[test]'"
    if find_library("fuse3") is None:
        return "libfuse is not installed: apt-get install fuse3 libfuse3-3"
    return None


def _may_mount() -> bool:
    held = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()
    return os.geteuid() == 0 and bool(held) and bool(int(held[0], 16) >> _CAP_SYS_ADMIN & 1)


def needs_lying_disks() -> None:
    """Skip a test where there can be none; in continuous integration only where there can be no mount."""
    if (reason := why_not()) is None:
        return
    import pytest  # not in the process that serves

    if os.environ.get("CI") == "true" and os.path.exists("/dev/fuse") and _may_mount():
        pytest.fail(f"no lying disk: {reason}", pytrace=False)
    pytest.skip(f"no lying disk: {reason}")


class LyingDisk:
    """The side of the tests of one mount."""

    def __init__(self, mount: Path, process: "subprocess.Popen[str]") -> None:
        self.path = mount
        self._process = process

    def set(self, *faults: Fault, **switches: bool) -> None:
        """Turn on these faults and switches, and off all others; what counts calls begins anew."""
        self._ask(asdict(Switches(faults=faults, **switches)))

    def clear(self) -> None:
        """Turn everything off: an honest disk."""
        self.set()

    def calls(self) -> Counter[str]:
        """How many calls there were since `set`, by name."""
        return Counter(self._ask("calls")["calls"])

    def faults_met(self) -> int:
        """How many calls met a fault since `set`."""
        return int(self._ask("calls")["met"])

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextmanager
def lying_disk(backing: Path, mount: Path, *, attributes_s: float = 0.0) -> Iterator[LyingDisk]:
    """Serve `backing` at `mount`, both made where they are missing; unmount it at the end, come what may.

    Args:
        attributes_s: names and attributes are remembered by the kernel for so long, as by an NFS client: changes
            made by another mount are seen late, except by who opens a file.
    """
    for directory in (backing, mount):
        directory.mkdir(parents=True, exist_ok=True)
    log = mount.with_name(f"{mount.name}.log")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, str(backing), str(mount), str(attributes_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"cannot mount {mount}: {log.read_text()}"
        yield LyingDisk(mount, process)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], capture_output=True, check=False)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    assert "Traceback" not in log.read_text(), log.read_text()


@dataclass(eq=False)
class _Open:
    """A file that some program has open."""

    descriptor: int
    identity: tuple[int, int]  # device and inode below
    process: int
    is_stale: bool = False


@dataclass
class _State:
    """What the switches are, and what was counted since they were set."""

    switches: Switches = field(default_factory=Switches)
    calls: Counter[str] = field(default_factory=Counter)
    by_fault: Counter[int] = field(default_factory=Counter)
    met: int = 0


_HIDDEN, _SILLY = ".fuse_hidden", ".nfs"  # libfuse's name of a file that is open and lost its name; NFS's


def _serve(backing: str, mount: str, attributes_s: float) -> None:
    import mfusepy

    class Disk(mfusepy.Operations):
        use_ns = True

        def __init__(self) -> None:
            self._root = os.path.abspath(backing)
            self._lock = threading.Lock()
            self._open: dict[int, _Open] = {}
            self._next = 1
            self._state = _State()

        def init_with_config(self, connection: Any, config: Any) -> None:
            config.use_ino = 1  # two names of one file have one inode
            config.entry_timeout = config.attr_timeout = config.negative_timeout = attributes_s
            threading.Thread(target=self._obey, daemon=True).start()

        # --- switches

        def _obey(self) -> None:
            """Answer questions of the tests until they are gone, and the mount with them."""
            _answer("ready")
            for line in sys.stdin:
                question = json.loads(line)
                with self._lock:
                    if question != "calls":
                        faults = tuple(Fault(**fault) for fault in question.pop("faults"))
                        self._state = _State(Switches(faults=faults, **question))
                    answer = {"calls": self._state.calls, "met": self._state.met}
                _answer(json.dumps(answer))
            subprocess.run(["umount", "--lazy", mount], capture_output=True, check=False)
            os.kill(os.getpid(), signal.SIGKILL)

        def _meet(self, call: str, path: str | None) -> None:
            """Count a call; fail or wait where a fault says so."""
            sleep_s, error = 0.0, 0
            with self._lock:
                state = self._state
                state.calls[call] += 1
                for number, fault in enumerate(state.switches.faults):
                    if fault.call not in (call, "any") or not _is_under(path, fault.under):
                        continue
                    state.by_fault[number] += 1
                    past = state.by_fault[number] - fault.at
                    if past >= 0 and (fault.times is None or past < fault.times):
                        state.met += 1
                        sleep_s, error = sleep_s + fault.sleep_s, error or fault.error
            if sleep_s:
                time.sleep(sleep_s)
            if error:
                raise OSError(error, os.strerror(error))

        # --- names

        def _below(self, path: str) -> str:
            """The path in the backing directory."""
            parts = [
                part.replace(_SILLY, _HIDDEN, 1) if part.startswith(_SILLY) else part
                for part in path.split("/")
            ]
            if not self._state.switches.ignores_case:
                return self._root + "/".join(parts)
            found = self._root
            for part in filter(None, parts):
                if not os.path.lexists(f"{found}/{part}") and os.path.isdir(found):
                    same = (name for name in os.listdir(found) if name.casefold() == part.casefold())
                    part = next(same, part)
                found = f"{found}/{part}"
            return found

        def getattr(self, path: str | None, fi: Any = None) -> dict[str, Any]:
            self._meet("getattr", path)
            if fi is not None:
                found = os.fstat(self._file(fi).descriptor)
            else:
                found = os.lstat(self._below(str(path)))
            names = (
                "st_mode",
                "st_ino",
                "st_nlink",
                "st_uid",
                "st_gid",
                "st_size",
                "st_blocks",
                "st_blksize",
            )
            times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
            return {name: getattr(found, name) for name in names} | times

        def readdir(self, path: str, handle: int) -> list[tuple[str, dict[str, int], int]]:
            self._meet("readdir", path)
            with os.scandir(self._below(path)) as entries:
                inodes = {".": 1, "..": 1} | {entry.name: entry.inode() for entry in entries}
            if self._state.switches.silly_rename:
                inodes = {name.replace(_HIDDEN, _SILLY, 1): inode for name, inode in inodes.items()}
            return [
                (name, {"st_ino": inode}, 0)  # an entry without an inode is overlooked
                for name, inode in inodes.items()
                if not name.startswith(_HIDDEN)
            ]

        def mkdir(self, path: str, mode: int) -> None:
            self._meet("mkdir", path)
            if self._state.switches.ignores_case and os.path.lexists(self._below(path)):
                raise OSError(errno.EEXIST, path)
            os.mkdir(self._below(path), mode)

        def rmdir(self, path: str) -> None:
            self._meet("rmdir", path)
            os.rmdir(self._below(path))

        def link(self, target: str, source: str) -> None:
            self._meet("link", target)
            os.link(self._below(source), self._below(target), follow_symlinks=False)

        def symlink(self, target: str, source: str) -> None:
            os.symlink(source, self._below(target))

        def readlink(self, path: str) -> str:
            return os.readlink(self._below(path))

        def unlink(self, path: str) -> None:
            name = os.path.basename(path)
            if not name.startswith(_HIDDEN):  # libfuse removes those itself, at the last close
                self._meet("unlink", path)
            if name.startswith(_SILLY) and self._opened(path):
                raise OSError(errno.EBUSY, path)
            self._forsake(path)
            os.unlink(self._below(path))

        def rename(self, old: str, new: str) -> None:
            if os.path.basename(new).startswith(
                _HIDDEN
            ):  # by libfuse: `old` is open, and about to lose its name
                if os.path.basename(old).startswith((_HIDDEN, _SILLY)):
                    raise OSError(errno.EBUSY, old)
                self._forsake(old)
            else:
                self._meet("rename", old)
                self._forsake(new)
            os.rename(self._below(old), self._below(new))

        # --- files

        def create(self, path: str, mode: int, fi: Any) -> int:
            self._meet("create", path)
            return self._open_file(path, fi, fi.flags | os.O_CREAT, mode)

        def open(self, path: str, fi: Any) -> int:
            self._meet("open", path)
            return self._open_file(path, fi, fi.flags & ~(os.O_CREAT | os.O_EXCL), 0)

        def _open_file(self, path: str, fi: Any, flags: int, mode: int) -> int:
            # The kernel appends by offset, and reads what a program only writes to a part of.
            flags = flags & ~(os.O_APPEND | os.O_NOFOLLOW) | os.O_CLOEXEC
            descriptor = os.open(self._below(path), flags, mode)
            found = os.fstat(descriptor)
            process = _process_of(mfusepy.fuse_get_context()[2])
            with self._lock:
                fi.fh, self._next = self._next, self._next + 1
                self._open[fi.fh] = _Open(descriptor, (found.st_dev, found.st_ino), process)
            # What is read is true, as where NFS asks the server at each open, though sizes may be remembered.
            fi.direct_io = int(self._state.switches.no_mmap or attributes_s > 0)
            return 0

        def _file(self, fi: Any) -> _Open:
            """The open file of a call. Raises: ESTALE where it is another client's by now."""
            file = self._open[fi.fh]
            if self._state.switches.stale and (file.is_stale or os.fstat(file.descriptor).st_nlink == 0):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return file

        def _opened(self, path: str) -> list[_Open]:
            """Who has this file open."""
            try:
                found = os.lstat(self._below(path))
            except OSError:
                return []
            with self._lock:
                return [file for file in self._open.values() if file.identity == (found.st_dev, found.st_ino)]

        def _forsake(self, path: str) -> None:
            """This file loses its last name: it is stale for other processes that have it open."""
            process = _process_of(mfusepy.fuse_get_context()[2])
            with suppress(OSError):
                if os.lstat(self._below(path)).st_nlink > 1:
                    return
            for file in self._opened(path):
                file.is_stale = file.is_stale or file.process != process

        def read(self, path: str | None, size: int, offset: int, fi: Any) -> bytes:
            self._meet("read", path)
            return os.pread(self._file(fi).descriptor, size, offset)

        def write(self, path: str | None, data: bytes, offset: int, fi: Any) -> int:
            self._meet("write", path)
            return os.pwrite(self._file(fi).descriptor, data, offset)

        def truncate(self, path: str | None, length: int, fi: Any = None) -> None:
            self._meet("truncate", path)
            os.truncate(self._below(str(path)) if fi is None else self._file(fi).descriptor, length)

        def fsync(self, path: str | None, datasync: int, fi: Any) -> None:
            self._meet("fsync", path)
            os.fsync(self._file(fi).descriptor)

        def fsyncdir(self, path: str | None, datasync: int, handle: int) -> None:
            self._meet("fsync", path)

        def flush(self, path: str | None, fi: Any) -> None:
            self._meet("flush", path)

        def release(self, path: str | None, fi: Any) -> None:
            with self._lock:
                file = self._open.pop(fi.fh)
            os.close(file.descriptor)
            self._meet("release", path)

        def chmod(self, path: str, mode: int) -> None:
            self._meet("chmod", path)
            os.chmod(self._below(path), mode)

        def chown(self, path: str, uid: int, gid: int) -> None:
            os.chown(self._below(path), uid, gid, follow_symlinks=False)

        def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
            # UTIME_NOW and UTIME_OMIT come as nanoseconds that no time has; what sets times here means both.
            os.utime(self._below(path), ns=times, follow_symlinks=False)

        def statfs(self, path: str) -> dict[str, int]:
            self._meet("statfs", path)
            found = os.statvfs(self._below(path))
            return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    mfusepy.FUSE(Disk(), mount, raw_fi=True, foreground=True, fsname="lying_disk")


def _answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _is_under(path: str | None, under: str) -> bool:
    if not under:
        return True
    return path is not None and (path + "/").startswith(f"/{under.strip('/')}/")


def _process_of(thread: int) -> int:
    """The process of a thread: the kernel names the thread that called."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{thread}/status").read_text().partition("Tgid:")[2].split()[0])
    return thread


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
