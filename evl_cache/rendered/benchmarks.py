"""Write the rendered benchmarks as folders of H.264 files: `<root>/<split>/<class>/<index>.mp4`.

T frames, H and W pixels (H = W = side).
"""

import contextlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evl_cache.canonical_json import json_text
from evl_cache.errors import UsageError
from evl_cache.rendered import motions, scenes
from evl_cache.rendered.files import Frames, write_video
from evl_cache.rendered.films import Film

DIFFICULTIES = ("easy", "normal", "hard")
_RECORD = "rendered.json"
_VERSION = 1  # of the drawing; it grows when any pixel changes

Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class _Benchmark:
    """How one benchmark is drawn.

    Attributes:
        classes: names of its classes.
        film: returns a clip for class, random stream, split, difficulty and number of frames.
        stream: returns the number of a class's random stream; two classes of one stream share their clips.
    """

    classes: tuple[str, ...]
    film: Callable[[str, Rng, str, str, int], Film]
    stream: Callable[[str], int]


def _scene(class_name: str, rng: Rng, split: str, difficulty: str, num_frames: int) -> Film:
    chosen = scenes.DIFFICULTIES[difficulty]
    return scenes.scene_film(class_name, rng, split=split, difficulty=chosen, num_frames=num_frames)


def _motion(class_name: str, rng: Rng, split: str, difficulty: str, num_frames: int) -> Film:
    chosen = motions.DIFFICULTIES[difficulty]
    return motions.motion_film(class_name, rng, split=split, difficulty=chosen, num_frames=num_frames)


BENCHMARKS: Mapping[str, _Benchmark] = {
    "scenes": _Benchmark(classes=scenes.CLASSES, film=_scene, stream=scenes.CLASSES.index),
    "motions": _Benchmark(
        classes=motions.CLASSES,
        film=_motion,
        stream=lambda name: next(n for n, pair in enumerate(motions.REVERSED) if name in pair),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What is rendered.

    Attributes:
        difficulty: one of `DIFFICULTIES`.
        clips_per_class: clips of each class by split.
        seed: of all clips.
        side: height and width in pixels.
        num_frames: frames of a clip.
        fps: frames a second.

    Raises: UsageError for a value out of range.
    """

    difficulty: str = "normal"
    clips_per_class: Mapping[str, int] = field(default_factory=lambda: {"train": 100, "val": 30})
    seed: int = 0
    side: int = 96
    num_frames: int = 16
    fps: int = 12

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise UsageError(f"difficulty {self.difficulty!r}; expected one of {', '.join(DIFFICULTIES)}")
        if self.side < 32 or self.side % 2 or self.num_frames < 2 or self.seed < 0 or self.fps < 1:
            raise UsageError(
                f"side {self.side}, {self.num_frames} frames, seed {self.seed}, {self.fps} frames a second; expected "
                "an even side of at least 32 pixels, at least 2 frames, a seed of at least 0 and 1 frame a second"
            )
        if set(self.clips_per_class) - {"train", "val"} or min(self.clips_per_class.values(), default=0) < 1:
            raise UsageError(
                f"clips of a class {dict(self.clips_per_class)}; expected at least 1 of train and val"
            )


def clip_frames(name: str, class_name: str, index: int, *, split: str, options: RenderOptions) -> Frames:
    """Return the frames of one clip, uint8 (T, side, side, 3); equal arguments give equal frames.

    Raises: UsageError for an unknown benchmark or class.
    """
    benchmark = _benchmark(name)
    if class_name not in benchmark.classes:
        raise UsageError(f"class {class_name!r} of {name}; expected one of {', '.join(benchmark.classes)}")
    stream = [options.seed, zlib.crc32(f"{name} {split}".encode()), benchmark.stream(class_name), index]
    rng = np.random.default_rng(stream)
    return benchmark.film(class_name, rng, split, options.difficulty, options.num_frames).frames(options.side)


def render(
    name: str,
    root: str | Path,
    *,
    options: RenderOptions,
    threads: int = 2,
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a benchmark's clips under a root; clips that are there already are kept, so it may be interrupted.

    Args:
        name: of the benchmark.
        root: new or empty folder, or one of an interrupted call with the same options.
        options: what is rendered.
        threads: clips that are drawn at once.
        on_clip: called after each clip, with the number of clips done and of all.

    Raises: UsageError for an unknown benchmark, or a root that holds clips of other options.
    """
    root = Path(root)
    benchmark = _benchmark(name)
    record = {"benchmark": name, "version": _VERSION, **asdict(options)}
    _claim(root, record)
    jobs = [
        (split, class_name, index)
        for split, count in options.clips_per_class.items()
        for class_name in benchmark.classes
        for index in range(count)
    ]
    for split, class_name in {job[:2] for job in jobs}:
        (root / split / class_name).mkdir(parents=True, exist_ok=True)

    def write(job: tuple[str, str, int]) -> None:
        split, class_name, index = job
        path = root / split / class_name / f"{index:04d}.mp4"
        if path.exists():
            return
        frames = clip_frames(name, class_name, index, split=split, options=options)
        write_video(path, frames, fps=options.fps)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        for done, _ in enumerate(pool.map(write, jobs), start=1):
            on_clip(done, len(jobs))
    _write_record(root, {**record, "is_complete": True})


def is_rendered(root: str | Path) -> bool:
    """Whether all clips that were begun in a folder are there; False for an empty or missing folder."""
    return bool(_read_record(Path(root)).get("is_complete", False))


def begun_options(root: str | Path) -> RenderOptions:
    """Return the options with which a folder was begun, or the default ones if it was not."""
    record = _read_record(Path(root))
    names = RenderOptions.__dataclass_fields__
    return RenderOptions(**{key: value for key, value in record.items() if key in names})


def _benchmark(name: str) -> _Benchmark:
    if name not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def _claim(root: Path, record: dict[str, Any]) -> None:
    """Begin a folder, or check that it was begun with the same options, also by another process just now."""
    if not _read_record(root):
        others = root.is_dir() and any(not name.startswith(".") for name in os.listdir(root))
        if others and not (root / _RECORD).exists():  # another process writes it before anything else
            raise UsageError(
                f"{root} holds other files and no {_RECORD}; choose an empty or new folder as --root"
            )
        root.mkdir(parents=True, exist_ok=True)
        _write_record(root, record, is_new=True)
    found = {key: value for key, value in _read_record(root).items() if key != "is_complete"}
    if found != record:
        differing = sorted(key for key in record if found.get(key) != record[key])
        raise UsageError(
            f"{root} holds clips of other options ({', '.join(differing)} differ); choose another --root, or remove it"
        )


def _read_record(root: Path) -> dict[str, Any]:
    path = root / _RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: is not JSON ({error}); remove the folder and render it again") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path}: is no record of rendered clips; remove the folder and render it again")
    return record


def _write_record(root: Path, record: dict[str, Any], *, is_new: bool = False) -> None:
    """Write the record whole; a new one stays as it is where another process was first."""
    unfinished = root / f".tmp-{secrets.token_hex(8)}{_RECORD}"
    try:
        unfinished.write_text(json_text(record, indent=2) + "\n", encoding="utf-8")
        if is_new:
            with contextlib.suppress(OSError):  # taken; or no hard links, and then the last one's stays
                os.link(unfinished, root / _RECORD)
                return
            if (root / _RECORD).exists():
                return
        os.replace(unfinished, root / _RECORD)
    finally:
        unfinished.unlink(missing_ok=True)
