"""A folder of classes: `<class>/<video>`, or `<split>/<class>/<video>`."""

from pathlib import Path

from evl_cache.clips import Clip, ClipList
from evl_cache.errors import UsageError

VIDEO_SUFFIXES = frozenset(".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv .3gp .mts".split())
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "test": "test",
}


def read_folder(root: Path) -> dict[str, ClipList]:
    """Clip lists by split (`all` where the folder is not divided), classes in alphabetical order.

    Files with other endings than a video's, and hidden ones, are passed over.

    Raises: UsageError where there is no folder of videos.
    """
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder; expected <class>/<video> or train/<class>/<video> under --root"
        )
    directories = [d for d in sorted(root.iterdir()) if d.is_dir() and not d.name.startswith(".")]
    splits = {_SPLIT_NAMES[d.name]: d for d in directories if d.name in _SPLIT_NAMES}
    divided = bool(splits) and len(splits) == len(directories)
    parts = splits if divided else {"all": root}
    classes = sorted(
        {d.name for part in parts.values() for d in part.iterdir() if d.is_dir() and _has_video(d)}
    )
    if not classes:
        raise UsageError(
            f"{root}: no video in any folder; expected <class>/<video> ({', '.join(sorted(VIDEO_SUFFIXES)[:6])}, …)"
        )
    return {split: _one_split(root, part, split, tuple(classes)) for split, part in parts.items()}


def _one_split(root: Path, part: Path, split: str, classes: tuple[str, ...]) -> ClipList:
    clips = []
    for label, name in enumerate(classes):
        for video in sorted((part / name).rglob("*")) if (part / name).is_dir() else []:
            if is_video(video):
                relative = video.relative_to(root).as_posix()
                clips.append(Clip(id=relative, path=relative, label=label, split=split))
    return ClipList(clips=tuple(clips), classes=classes, source=str(part))


def is_video(path: Path) -> bool:
    """Whether a file looks like a video by its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _has_video(directory: Path) -> bool:
    return any(is_video(path) for path in directory.rglob("*"))
