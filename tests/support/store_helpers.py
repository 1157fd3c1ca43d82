"""Small caches of rendered clips for the tests of the store, and what compares and watches directories."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from evl_cache.clips import Clip, ClipList
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.stage import ExtractResult, extract, make_spec
from evl_cache.processes.rendezvous import Rendezvous
from evl_cache.rendered import DEMO_CLASSES, demo_motion_frames, write_video
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store import array_layouts, mark_path
from evl_cache.store.format.layout import MANIFEST_NAME
from evl_cache.towers import Tower, build_tower

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "05.mp4"  # of the clips that `make_clips` writes
BLOCK_CLIPS = 3
# Calls by which a process changes a directory or a file of a cache.
CHANGES = ("open", "write", "writev", "fsync", "link", "unlink", "rename", "replace", "mkdir", "pwrite")
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
        label = i % len(DEMO_CLASSES)
        frames = demo_motion_frames(DEMO_CLASSES[label], i // len(DEMO_CLASSES), seed=seed)
        write_video(folder / name, frames)
        clips.append(Clip(id=name, path=name, label=label, split="train"))
    if broken and count > 5:
        (folder / BROKEN).write_bytes((folder / BROKEN).read_bytes()[:200])
    (folder / "tower.json").write_text(json.dumps(_TOWER))
    return ClipList(clips=tuple(clips), classes=DEMO_CLASSES, source=str(folder))


def load_clips(folder: Path) -> ClipList:
    """The list of clips that `make_clips` made, or that lies there as `list.jsonl`."""
    listed = folder / "list.jsonl"
    if listed.exists():
        rows = listed.read_text().splitlines()
        given = tuple(Clip.from_json(json.loads(row)) for row in rows)
        return ClipList(clips=given, classes=DEMO_CLASSES, source=str(folder))
    clips = [
        Clip(id=path.name, path=path.name, label=i % len(DEMO_CLASSES), split="train")
        for i, path in enumerate(sorted(folder.glob("*.mp4")))
    ]
    return ClipList(clips=tuple(clips), classes=DEMO_CLASSES, source=str(folder))


@lru_cache(maxsize=4)
def small_tower(folder: Path) -> Tower:
    """The tower whose configuration `make_clips` wrote; random weights from a fixed seed."""
    tower = build_tower(str(folder / "tower.json"), "none")
    return tower._replace(spec=replace(tower.spec, model="small"))


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


def small_job(
    clips: ClipList, cache: Path, *, spec: CacheSpec | None = None, folder: Path | None = None
) -> ExtractionJob:
    """The job of a list of `make_clips`. `folder`: where the videos lie, if not where the list comes from."""
    tower = small_tower(Path(clips.source))
    return ExtractionJob(
        clips=clips,
        root=folder or Path(clips.source),
        cache_path=cache,
        spec=spec or small_spec(clips, tower),
        tower=tower,
    )


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

    `folder`: as `small_job`. `rendezvous`: of several processes.
    """
    with one_thread():
        return extract(
            small_job(clips, cache, spec=spec, folder=folder),
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


def clear_mark(cache: Path, spec: CacheSpec, block: int) -> None:
    """Make a block not exist: no manifest, no mark, no files."""
    names = [
        MANIFEST_NAME,
        mark_path(Path(), block),
        *(a.shard(Path(), block) for a in array_layouts(spec).values()),
    ]
    for name in names:
        (cache / name).unlink(missing_ok=True)


def tree(cache: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones included, by relative name."""
    found = {}
    for path in sorted(cache.rglob("*")):
        if path.is_file():
            with suppress(
                FileNotFoundError
            ):  # such as one that lost its name while it was open, on a FUSE disk
                found[path.relative_to(cache).as_posix()] = path.read_bytes()
    return found


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


def wait_until(happened: Callable[[], bool], *, what: str, timeout_s: float = 90.0) -> None:
    """Poll. Fails the test that waits in vain."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain: {what}")
        time.sleep(0.005)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
