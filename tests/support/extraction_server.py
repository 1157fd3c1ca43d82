"""Extractions in children that may be killed, stopped or starved. As a script: the process that forks them."""

import errno
import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evl_cache.clips import ClipList
from evl_cache.errors import EvlCacheError
from evl_cache.extract.stage import ExtractResult
from evl_cache.processes.place import ProcessPlace
from evl_cache.processes.rendezvous import PATIENCE_S, Rendezvous
from evl_cache.spec import CacheSpec
from evl_cache.store.writing.publication import BlockPublication
from evl_cache.towers.tower import Tower
from tests.support import warm_worker
from tests.support.fork_server import ForkServer, serve
from tests.support.grown_caches import grow
from tests.support.network_hosts import Host
from tests.support.store_helpers import (
    extract_small,
    load_clips,
    small_spec,
    small_tower,
    wait_until,
    watched_changes,
)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: exit code (negative: by that signal), and what it reported."""

    code: int
    report: dict[str, Any]


class Server(ForkServer):
    """Extracts the clips of a folder that `make_clips` filled. `start` and `wait`, or `run`.

    `host`: where; its pids are those of there.
    """

    def __init__(self, folder: Path, host: Host | None = None) -> None:
        self.folder, self._jobs = folder, 0
        self._reports: dict[int, Path] = {}
        where = () if host is None else (host.name, host.address, host.namespace)
        super().__init__(__file__, str(folder), *where)

    def start(self, cache: Path, **job: Any) -> int:
        """Start a child that extracts into `cache`; see `_run_job` for what a job may hold."""
        self._jobs += 1
        report = self.folder / f"report-{self.pid}-{self._jobs}.json"
        pid = self.fork({"cache": str(cache), "report": str(report), **job})
        self._reports[pid] = report
        return pid

    def wait(self, pid: int) -> Ended:
        """Until the child has ended."""
        code = self.ended(pid)
        report = self._reports.pop(pid)
        return Ended(code=code, report=json.loads(report.read_text()) if report.exists() else {})

    def run(self, cache: Path, **job: Any) -> Ended:
        return self.wait(self.start(cache, **job))


def _run_job(job: Mapping[str, Any], clips: ClipList, tower: Tower) -> None:
    """In the child. Keys of a job: cache, report; and, where given,

    clips: only so many of the list. spec: changes to it. options: of the extraction. folder: other videos.
    kill_at: SIGKILL at this change (see CHANGES); kill_after: behind it, not before; kill_call: of these alone.
    no_links: there are no hard links.
    file_limit: bytes of the largest file. polite: SIGTERM raises SystemExit. clip_s: pause after each clip.
    gates: files by the number of a clip: behind that one, the child waits until the file is there; see `reached`.
    stop_before_link, stop_before_rename, stop_before_replace: SIGSTOP before the call whose target contains this, once.
    stop_before_publishing: SIGSTOP in the first commit, between the look at the lock and the first change.
    grow: the cache grows into that spec, where it is there.
    environment: as torchrun would set it. patience_s: with its rendezvous store.
    """
    os.environ.update(job.get("environment", {}))
    if job.get("stop_before_publishing"):
        _stop_before_publishing()
    if job.get("no_links"):
        os.link = _no_link
    if job.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    if job.get("polite"):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    chosen = clips.clips[: job.get("clips", len(clips.clips))]
    clips = replace(clips, clips=chosen)
    report: dict[str, Any] = {}
    counted, passes, lost = _Counter(job), _Passes(tower), []
    try:
        with watched_changes(counted):
            result = (_grown if job.get("grow") else extract_small)(
                clips,
                Path(job["cache"]),
                spec=small_spec(clips, tower, **job.get("spec", {})),
                folder=Path(job.get("folder", clips.source)),
                on_clip=_Gates(job),
                rendezvous=Rendezvous.of_environment(
                    ProcessPlace.of_environment(),
                    on_lost=lost.append,
                    patience_s=job.get("patience_s", PATIENCE_S),
                ),
                **{k: Path(v) if k == "reuse" else v for k, v in job.get("options", {}).items()},
            )
        report = {"digest": result.cache_digest, "here": result.clips_done_here, "failures": result.failures}
    except EvlCacheError as error:
        report = {"error": type(error).__name__, "message": str(error)}
    report |= {"changes": counted.count, "passes": passes.count, "rendezvous_lost": lost}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(job["report"]).write_text(json.dumps(report))


def _grown(clips: ClipList, cache: Path, *, spec: CacheSpec, **_: Any) -> ExtractResult:
    """Let a cache grow into a spec, as `extract_small` makes one."""
    return grow(clips, cache, layers=tuple(spec.layers))


def _no_link(*_: Any, **__: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _stop_before_publishing() -> None:
    real = BlockPublication.publish_file

    def publish_file(self: BlockPublication, *args: Any, **options: Any) -> None:
        BlockPublication.publish_file = real  # type: ignore[method-assign]
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        real(self, *args, **options)

    BlockPublication.publish_file = publish_file  # type: ignore[method-assign]


def reached(gate: Path) -> Path:
    """The file that a child makes when it has come to a gate."""
    return gate.with_name(f"{gate.name} reached")


class _Gates:
    """Called after each clip: pauses, and waits at gates."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._clip_s, self._clips = job.get("clip_s", 0), 0
        self._gates = {int(number): Path(gate) for number, gate in job.get("gates", {}).items()}

    def __call__(self, failed: bool) -> None:
        time.sleep(self._clip_s)
        self._clips += 1
        if (gate := self._gates.get(self._clips)) is not None:
            reached(gate).touch()
            wait_until(gate.exists, what=f"{gate} opens", timeout_s=120)


class _Counter:
    """Counts changes; kills or stops its own process at one of them."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._kill_at, self._after = job.get("kill_at"), bool(job.get("kill_after"))
        self._only = job.get("kill_call")
        self._stop_at = {call: job.get(f"stop_before_{call}") for call in ("link", "rename", "replace")}
        self._lock = threading.Lock()
        self.count = 0

    def __call__(self, name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        with self._lock:
            self.count += self._only in (None, name)
            is_it = self.count == self._kill_at and self._only in (None, name)
            target = self._stop_at.get(name)
            stops = target is not None and target in str(args[1])
            if stops:
                self._stop_at[name] = None
        if stops:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if is_it and not self._after:
            signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
        try:
            return call()
        finally:  # also where the call fails: a file that is not there is looked for as well
            if is_it:
                signal.pthread_kill(threading.get_ident(), signal.SIGKILL)


class _Passes:
    """Counts forward passes of the tower."""

    def __init__(self, tower: Tower) -> None:
        self.count = 0
        tower.visual.conv1.register_forward_pre_hook(self._pass)  # type: ignore[operator, union-attr]

    def _pass(self, *_: Any) -> None:
        self.count += 1


def _serve(folder: Path) -> None:
    faulthandler.enable()  # a job that hangs is ended by SIGABRT, and says where it hung
    clips = load_clips(folder)
    torch.set_num_threads(1)
    tower = small_tower(folder)
    warm_worker.use_where_there()
    serve(lambda job: _run_job(job, clips, tower))


if __name__ == "__main__":
    folder, *where = sys.argv[1:]
    if where:
        Host(*where).enter()
    _serve(Path(folder))
