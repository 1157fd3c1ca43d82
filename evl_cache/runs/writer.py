"""One writer a run directory: it holds a lock there, and a second one is told who that is.

A dead writer's directory is taken over: at once if it died on this machine. Of another machine only the lock's counter
tells, which a living writer moves: it is watched for `EXPIRY_S`, by this process's clock.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from evl_cache.errors import EvlCacheError, UsageError
from evl_cache.store import EXPIRY_S, REAL, BlockLock, LockWatcher, Runtime, is_staging_name, lock_holder

RUNS_NAME = "runs"  # the folder of a sweep with a run directory for each of its heads
OnWait = Callable[[str], None]
_LOCK = "writer"
_LOOK_S = 1.0


class RunWriter:
    """The right to write a run directory, or a sweep's."""

    def __init__(self, out: Path, lock: BlockLock) -> None:
        self.out, self._lock = out, lock

    def check(self) -> None:
        """Check that nobody has taken over. Raises: EvlCacheError where another process has, while this one was paused."""
        if self._lock.is_held():
            return
        holder = lock_holder(self.out, _LOCK)
        who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
        raise EvlCacheError(
            f"{self.out}: {who} took this run over, as this one stood still for over {EXPIRY_S:g} s; "
            "the run goes on there, nothing more is written from here"
        )


@contextmanager
def writing(
    out: Path,
    *,
    beside: Sequence[Path] = (),
    on_wait: OnWait = lambda message: None,
    expiry_s: float = EXPIRY_S,
    runtime: Runtime = REAL,
) -> Iterator[RunWriter]:
    """Make a run directory, if it is not there, and be its only writer.

    Args:
        beside: directories that nobody may be writing when this one begins: the runs of a sweep.
        on_wait: told once, if a writer on another machine must be watched first.
        expiry_s: how long that one may stand still.

    Raises: UsageError that names the other writer; OSError or CacheError where the disk refuses.
    """
    with ExitStack() as kept:
        for missing in [place for place in (*reversed(out.parents), out) if not place.is_dir()]:
            kept.enter_context(removed_if_empty(missing))
        out.mkdir(parents=True, exist_ok=True)
        others = [place for place in (*_around(out), *beside) if lock_holder(place, _LOCK) is not None]
        watchers = {place: LockWatcher(place, expiry_s=expiry_s, runtime=runtime) for place in (out, *others)}
        lock = _take_all(watchers, on_wait, runtime)[out]
        kept.enter_context(lock)
        for left in [path for path in out.iterdir() if _is_leftover(path.name)]:
            left.unlink(missing_ok=True)  # a killed writer's: nobody else writes here
        yield RunWriter(out, lock)


@contextmanager
def removed_if_empty(directory: Path) -> Iterator[None]:
    """At the end, remove a directory that nothing was written to."""
    try:
        yield
    finally:
        with suppress(OSError):
            directory.rmdir()


def new_run_directory(cache_name: str, head: str) -> Path:
    """Make the first of `runs/<cache>-<head>-<number>` that is free; two processes never get the same."""
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    number = 1
    while True:
        path = folder / f"{cache_name}-{head}-{number}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _is_leftover(name: str) -> bool:
    return is_staging_name(name) or name.startswith(f".{_LOCK}.lock-")


def _around(out: Path) -> list[Path]:
    """Return the sweep that a run may be one of."""
    whole = Path(os.path.abspath(out))
    return [whole.parent.parent] if whole.parent.name == RUNS_NAME else []


def _take_all(watchers: dict[Path, LockWatcher], on_wait: OnWait, runtime: Runtime) -> dict[Path, BlockLock]:
    """Take the first directory's lock, then see that nobody has those of the others, which are given back.

    All are watched at the same time. Raises: UsageError where one is held by a process that lives.
    """
    first = next(iter(watchers))
    seen: dict[Path, bytes] = {}
    found: dict[Path, BlockLock] = {}
    with ExitStack() as taken:
        waiting = dict(watchers)
        while waiting:
            for place, watcher in list(waiting.items()):
                lock = watcher.take_named(_LOCK)
                if lock is None:
                    _refuse_living(place, seen, on_wait)
                    continue
                del waiting[place]
                if place == first:
                    found[place] = taken.enter_context(lock)
                else:
                    lock.release()
            if waiting:
                runtime.sleep(_LOOK_S)
        taken.pop_all()
    return found


def _refuse_living(place: Path, seen: dict[Path, bytes], on_wait: OnWait) -> None:
    """Note what a lock says. Raises: UsageError where its holder lives, as this machine knows or its counter shows."""
    holder = lock_holder(place, _LOCK)
    if holder is None:
        return  # given back just now
    if holder.is_alive or seen.get(place, holder.content) != holder.content:
        raise UsageError(
            f"{place}: process {holder.pid} on {holder.host} is writing there; wait for its end, stop it, "
            "or use another --out"
        )
    if holder.is_alive is None and place not in seen:
        if not seen:
            on_wait(
                f"{place}: process {holder.pid} on {holder.host} was writing there; seeing for up to {EXPIRY_S:g} s "
                "whether it lives"
            )
        seen[place] = holder.content
