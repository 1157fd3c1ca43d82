"""Extractions on a disk that lies, by seed: switches, a fault, a kill and a second job are drawn from it.

Whatever happens, a job ends well, is killed, or stops with one clear line; and the same command on an honest disk then
gives the files of an undisturbed cache, byte by byte.
"""

import errno
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evl_cache.store.disk.lock_files import ASIDE_NAME, LOCK_NAME
from evl_cache.store.disk.publish import is_staging_name
from tests.support.extraction_server import Ended, Server
from tests.support.lying_disk import NO_HARD_LINKS, Fault, LyingDisk, lying_disk
from tests.support.store_helpers import differences, make_clips, tree

# Three clips in two blocks; a lock that its holder lost is taken over soon.
JOB: dict[str, Any] = {"spec": {"block_clips": 2}, "options": {"lock_expiry_s": 2.0}}
_SCRATCH = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
_HIDDEN = ".fuse_hidden"  # of files that are open: gone with the process that had them open
SWITCHES = ("silly_rename", "stale", "no_mmap", "ignores_case")
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EACCES, errno.ENOTCONN)
_TIMES = (1, 1, 3, None)
_REMEMBERED_S = 1.0
LONGEST_S = 120.0  # of a job: it hangs


class Failed(AssertionError):
    """A schedule ended wrong."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What happens to an extraction.

    Attributes:
        switches, faults: of the disk.
        kill_at: SIGKILL of the first job after this share of an undisturbed job's time; None: never.
        jobs: that work at once.
        remembers: the jobs are two clients, each with a memory of names and attributes.
    """

    switches: dict[str, bool] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    kill_at: float | None = None
    jobs: int = 1
    remembers: bool = False


@dataclass(kw_only=True)
class Bench:
    """An undisturbed cache, and disks to disturb others on.

    Attributes:
        server: extracts. folder: what lies on the disks, as it is. honest: its disk, without a memory.
        clients: two disks over it that remember names and attributes.
        files, seconds, calls: of the undisturbed cache.
    """

    server: Server
    folder: Path
    honest: LyingDisk
    clients: tuple[LyingDisk, LyingDisk]
    files: dict[str, bytes]
    seconds: float
    calls: Counter[str]


@contextmanager
def made_bench(folder: Path) -> Iterator[Bench]:
    """Make it in an empty folder."""
    make_clips(folder / "clips", 3)
    server = Server(folder / "clips")
    with ExitStack() as stack:
        # In memory: a schedule takes half as long as on a disk whose syncs take time.
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evl-disk-", dir=_SCRATCH)))
        stack.callback(server.close)
        honest = stack.enter_context(lying_disk(disk, folder / "honest"))
        one, two = (
            stack.enter_context(lying_disk(disk, folder / name, attributes_s=_REMEMBERED_S))
            for name in ("one", "two")
        )
        server.run(folder / "first", **JOB)  # loads what is loaded once
        files = tree(folder / "first")
        honest.clear()
        began = time.monotonic()
        ended = server.run(honest.path / "cache", **JOB)
        seconds = time.monotonic() - began
        assert ended.code == 0
        assert differences(tree(disk / "cache"), files) == []
        shutil.rmtree(disk / "cache")
        yield Bench(
            server=server,
            folder=disk,
            honest=honest,
            clients=(one, two),
            files=files,
            seconds=seconds,
            calls=honest.calls(),
        )


def drawn(seed: int, calls: Counter[str]) -> Schedule:
    """The schedule of a seed. calls: of an undisturbed extraction, by name."""
    rng = random.Random(seed)
    faults = []
    if rng.random() < 0.6:
        call = rng.choice([*sorted(calls), "any"])
        most = sum(calls.values()) if call == "any" else calls[call]
        at = rng.randint(1, most)
        faults.append(Fault(call, rng.choice(_ERRORS), at=at, times=rng.choice(_TIMES)))
    if rng.random() < 0.3:
        faults.append(NO_HARD_LINKS)
    if rng.random() < 0.2:
        faults.append(Fault("flush", sleep_s=0.003, times=None))
    jobs = rng.choice((1, 1, 1, 2))
    return Schedule(
        switches={name: rng.random() < 0.4 for name in SWITCHES},
        faults=tuple(faults),
        kill_at=rng.random() if rng.random() < 0.6 else None,
        jobs=jobs,
        remembers=rng.random() < 0.6,
    )


def run_schedule(bench: Bench, schedule: Schedule, name: str) -> list[Ended]:
    """Run it in a cache of its own, and then an undisturbed job. Raises: Failed."""
    disks = bench.clients if schedule.remembers else (bench.honest, bench.honest)
    for disk in set(disks):
        disk.set(*schedule.faults, **schedule.switches)
    pids: list[int] = []

    def abort() -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGABRT)

    hangs = threading.Timer(LONGEST_S, abort)
    hangs.start()
    try:
        pids += [bench.server.start(disk.path / name, **JOB) for disk in disks[: schedule.jobs]]
        if schedule.kill_at is not None:
            time.sleep(schedule.kill_at * bench.seconds)
            os.kill(pids[0], signal.SIGKILL)
        ends = [bench.server.wait(pid) for pid in pids]
    finally:
        hangs.cancel()
        for disk in set(disks):
            disk.clear()
    for ended in ends:
        _check_end(ended, may_be_killed=schedule.kill_at is not None)
    if all(ended.code == 0 and "digest" in ended.report for ended in ends):
        check_files(bench, name, leftovers=True)
    ended = bench.server.run(disks[0].path / name, **JOB)
    if ended.code != 0 or "digest" not in ended.report:
        raise Failed(f"on an honest disk the same command does not go on: {ended}")
    # What unlinking did not remove stays for good where its block is done: `verify` knows it, and nothing reads it.
    # The kernel looks at a file (getattr) before it removes it.
    leftovers = any(fault.call in ("getattr", "unlink", "any") for fault in schedule.faults)
    check_files(bench, name, leftovers=leftovers)
    shutil.rmtree(bench.folder / name)
    return ends


def run_seed(bench: Bench, seed: int) -> list[Ended]:
    """Run a seed's schedule. Raises: Failed, which names the seed."""
    schedule = drawn(seed, bench.calls)
    try:
        return run_schedule(bench, schedule, f"cache-{seed}")
    except Exception as error:
        raise Failed(f"seed {seed}, {schedule}: {error}") from error


def _check_end(ended: Ended, *, may_be_killed: bool) -> None:
    if ended.code == -signal.SIGKILL and may_be_killed:
        return
    if ended.code != 0 or not ended.report:
        raise Failed(f"a job ended with neither a result nor a clear error: {ended}")
    message = ended.report.get("message", "; ")
    if "\n" in message or not message.strip():
        raise Failed(f"no clear error: {message!r}")


def check_files(bench: Bench, name: str, *, leftovers: bool = False) -> None:
    """Check the files against the undisturbed ones. Raises: Failed.

    leftovers: of locks and staged files, which the disk did not let the jobs remove, may be there.
    """
    deadline = time.monotonic() + 30
    while wrong := differences(tree(bench.folder / name), bench.files):
        if leftovers and all(map(_is_leftover, wrong)):
            return
        if not all(_HIDDEN in path for path in wrong) or time.monotonic() > deadline:
            raise Failed(f"these files differ from those of an undisturbed cache: {wrong}")
        time.sleep(0.01)


def _is_leftover(path: str) -> bool:
    name = Path(path).name
    return is_staging_name(name) or bool(LOCK_NAME.fullmatch(name) or ASIDE_NAME.fullmatch(name))
