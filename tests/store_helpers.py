"""Small caches for the tests of the store, and a process that extracts in children which may be killed.

Run as a script, this module is that process: it loads torch and the tower once, and forks a child a job, so
that a job costs a fraction of a second. Parent and children use one thread for torch, and the parent neither
decodes nor runs anything before it forks.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from evl_cache.clips import Clip, ClipList
from evl_cache.errors import EvlCacheError
from evl_cache.extract import ExtractOptions, ExtractResult, extract, make_spec
from evl_cache.extract_block import Tower
from evl_cache.rendered import MOTION_CLASSES, motion_frames, write_video
from evl_cache.rendezvous import Place, Rendezvous
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store import block_writer
from evl_cache.towers import build_tower

ROOT = Path(__file__).resolve().parent.parent
BROKEN = "05.mp4"  # of the clips that `make_clips` writes
BLOCK_CLIPS = 3
# Calls by which a process changes a directory or a file of a cache.
CHANGES = ("open", "write", "fsync", "link", "unlink", "rename", "replace", "mkdir", "pwrite")
_TOWER = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
}


def make_clips(folder: Path, count: int = 8, *, seed: int = 0, broken: bool = True) -> ClipList:
    """Render `count` videos of 8 frames into `folder`; one of them (BROKEN) is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for i in range(count):
        name = f"{i:02d}.mp4"
        label = i % len(MOTION_CLASSES)
        frames = motion_frames(MOTION_CLASSES[label], i // len(MOTION_CLASSES), seed=seed)
        write_video(folder / name, frames)
        clips.append(Clip(id=name, path=name, label=label, split="train"))
    if broken and count > 5:
        (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:200])
    (folder / "tower.json").write_text(json.dumps(_TOWER))
    return ClipList(clips=tuple(clips), classes=MOTION_CLASSES, source=str(folder))


@lru_cache(maxsize=4)
def small_tower(folder: Path) -> Tower:
    """The tower whose configuration `make_clips` wrote; random weights from a fixed seed."""
    visual, spec = build_tower(str(folder / "tower.json"), "none")
    return Tower(visual=visual, spec=replace(spec, model="small"))


def small_spec(clips: ClipList, tower: Tower, **changes: Any) -> CacheSpec:
    """Two layers, blocks of BLOCK_CLIPS clips; `changes` to the spec by field."""
    spec = make_spec(
        clips,
        dataset="motions",
        split="train",
        tower=tower.spec,
        layers=(2, 3),
        views=ViewSpec(frames=4, stride=2),
    )
    return replace(spec, **{"block_clips": BLOCK_CLIPS, **changes})


def extract_small(
    clips: ClipList,
    cache: Path,
    *,
    spec: CacheSpec | None = None,
    on_clip: Callable[[bool], None] = lambda failed: None,
    folder: Path | None = None,
    rendezvous: Rendezvous | None = None,
    **options: Any,
) -> ExtractResult:
    """Extract a list of `make_clips` on one thread, as the server's children do.

    `folder`: where the videos lie, if not where the list comes from. `rendezvous`: of several processes.
    """
    tower = small_tower(Path(clips.source))
    with one_thread():
        return extract(
            clips,
            root=folder or Path(clips.source),
            cache=cache,
            spec=spec or small_spec(clips, tower),
            tower=tower,
            options=ExtractOptions(batch=4, decode_workers=1, **options),
            on_clip=on_clip,
            rendezvous=rendezvous,
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """The number of threads is in the marks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tree(cache: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones included, by relative name."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


def differences(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Names that are in one tree only, or differ."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@contextmanager
def watched_changes(saw: Callable[[str, tuple[Any, ...], Callable[[], Any]], Any]) -> Iterator[None]:
    """Have `saw(name, arguments, call)` make the calls of CHANGES of module `os`."""
    real = {name: getattr(os, name) for name in CHANGES}

    def watcher(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: saw(name, args, lambda: real[name](*args, **kwargs))

    try:
        for name in CHANGES:
            setattr(os, name, watcher(name))
        yield
    finally:
        for name in CHANGES:
            setattr(os, name, real[name])


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: exit code (negative: by that signal), and what it reported."""

    code: int
    report: dict[str, Any]


class Server:
    """The process that forks. `start` and `wait`; signals are sent by process id.

    `host`: words of a command that starts it elsewhere, in name spaces of its own say; pids are those of there.
    """

    def __init__(self, folder: Path, host: Sequence[str] = ()) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.folder, self._jobs = folder, 0
        self._reports: dict[int, Path] = {}
        self._process = subprocess.Popen(
            [*host, sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert self._answer() == "ready"

    def start(self, cache: Path, **job: Any) -> int:
        """Start a child that extracts into `cache`; see `_run_job` for what a job may hold."""
        self._jobs += 1
        report = self.folder / f"report-{self._process.pid}-{self._jobs}.json"
        pid = int(self._ask({"start": {"cache": str(cache), "report": str(report), **job}}))
        self._reports[pid] = report
        return pid

    def wait(self, pid: int) -> Ended:
        """Until the child has ended."""
        code = int(self._ask({"wait": pid}))
        report = self._reports.pop(pid)
        return Ended(code=code, report=json.loads(report.read_text()) if report.exists() else {})

    def run(self, cache: Path, **job: Any) -> Ended:
        return self.wait(self.start(cache, **job))

    def signal(self, pid: int, number: int) -> None:
        """To a child, by its pid where it runs."""
        assert self._ask({"signal": [pid, number]}) == "sent"

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, question: Mapping[str, Any]) -> str:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def wait_until(happened: Callable[[], bool], *, what: str, timeout_s: float = 30.0) -> None:
    """Poll. Fails the test that waits in vain."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain: {what}")
        time.sleep(0.005)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _run_job(job: Mapping[str, Any], clips: ClipList, tower: Tower) -> None:
    """In the child. Keys of a job: cache, report; and, where given,

    clips: only so many of the list. spec: changes to it. options: of the extraction. folder: other videos.
    kill_at: SIGKILL at this change (see CHANGES); kill_after: behind it, not before.
    file_limit: bytes of the largest file. polite: SIGTERM raises SystemExit. clip_s: pause after each clip.
    stop_before_link: SIGSTOP before the link whose target's name contains this, once.
    stop_before_clearing: SIGSTOP in the first commit, between the look at the lock and the first change.
    environment: as torchrun would set it.
    """
    os.environ.update(job.get("environment", {}))
    if job.get("stop_before_clearing"):
        _stop_before_clearing()
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
            result = extract_small(
                clips,
                Path(job["cache"]),
                spec=small_spec(clips, tower, **job.get("spec", {})),
                folder=Path(job.get("folder", clips.source)),
                on_clip=lambda failed: time.sleep(job.get("clip_s", 0)),
                rendezvous=Rendezvous.of_environment(Place.of_environment(), on_lost=lost.append),
                **{k: Path(v) if k == "reuse" else v for k, v in job.get("options", {}).items()},
            )
        report = {"digest": result.cache_digest, "here": result.clips_done_here, "failures": result.failures}
    except EvlCacheError as error:
        report = {"error": type(error).__name__, "message": str(error)}
    report |= {"changes": counted.count, "passes": passes.count, "rendezvous_lost": lost}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(job["report"]).write_text(json.dumps(report))


def _stop_before_clearing() -> None:
    real = block_writer.clear_mark

    def clear_mark(*args: Any, **kwargs: Any) -> None:
        block_writer.clear_mark = real
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        real(*args, **kwargs)

    block_writer.clear_mark = clear_mark


class _Counter:
    """Counts changes; kills or stops its own process at one of them."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._kill_at, self._after = job.get("kill_at"), bool(job.get("kill_after"))
        self._stop_at = job.get("stop_before_link")
        self._lock = threading.Lock()
        self.count = 0

    def __call__(self, name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        with self._lock:
            self.count += 1
            is_it = self.count == self._kill_at
            stops = self._stop_at is not None and name == "link" and self._stop_at in str(args[1])
            if stops:
                self._stop_at = None
        if stops:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if is_it and not self._after:
            signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
        result = call()
        if is_it:
            signal.pthread_kill(threading.get_ident(), signal.SIGKILL)
        return result


class _Passes:
    """Counts forward passes of the tower."""

    def __init__(self, tower: Tower) -> None:
        self.count = 0
        tower.visual.conv1.register_forward_pre_hook(self._pass)  # type: ignore[operator, union-attr]

    def _pass(self, *_: Any) -> None:
        self.count += 1


def _serve(folder: Path) -> None:
    clips = load_clips(folder)
    torch.set_num_threads(1)
    tower = small_tower(folder)
    import decord  # noqa: F401  here, so that children need not

    def answer(text: object) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    answer("ready")
    for line in sys.stdin:
        question = json.loads(line)
        if "signal" in question:
            os.kill(*question["signal"])
            answer("sent")
            continue
        if "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            answer(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _run_job(question["start"], clips, tower)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        answer(pid)


def load_clips(folder: Path) -> ClipList:
    """The list of clips that `make_clips` made."""
    clips = [
        Clip(id=path.name, path=path.name, label=i % len(MOTION_CLASSES), split="train")
        for i, path in enumerate(sorted(folder.glob("*.mp4")))
    ]
    return ClipList(clips=tuple(clips), classes=MOTION_CLASSES, source=str(folder))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
